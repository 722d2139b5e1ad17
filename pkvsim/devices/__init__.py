"""GPUs: what each is, what its routes cost, and how one that nobody measured is derived."""
