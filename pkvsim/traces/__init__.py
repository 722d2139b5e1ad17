"""Requests: the paper's families and files, and the traces that others publish."""
