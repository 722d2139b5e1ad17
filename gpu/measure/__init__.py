"""Timing from cold caches, benchmark pools, and what is told of a run.

Read `timing`: kernel time inside CUDA graphs whose calls read distinct bytes, and the streaming limit that everything
is divided by. `cases` lays a step out in a pool of `pools`, runs it once to be checked and times it; `step_timing`
times a whole step with its planning. `memory` says how much a script may plan with and what it took, `environment`
what it was measured on, `progress` how far it is.
"""
