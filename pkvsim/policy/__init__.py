"""Which route a step takes, and why."""
