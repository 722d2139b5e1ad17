"""A simulated server: what runs in every step, and what it costs."""
