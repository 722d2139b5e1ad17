"""Timing from cold caches, benchmark pools, and what is told of a run."""
