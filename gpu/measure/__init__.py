"""Timing from cold caches, benchmark pools, and what is told of a run.

Read `timing`: kernel time inside CUDA graphs whose calls read distinct bytes, and the streaming limit that
everything is divided by. `cases` lays one step out, checks it and times it, on the copies that `pools` makes;
`step_timing` times a whole step with its planning. `environment` says what it was measured on, `memory` how much of
the GPU a script may plan with, `progress` how far it is.
"""
