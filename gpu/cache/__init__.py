"""A paged KV pool, and the writer that appends to its pages."""
