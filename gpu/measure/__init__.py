"""Timing from cold caches, benchmark pools, and what is told of a run.

Read `timing`: kernel time inside CUDA graphs whose calls read distinct bytes, and the streaming limit that
everything is divided by. `step_timing` times a whole step with its planning, on the copies that `pools` lays out;
`environment` says what it was measured on.
"""
