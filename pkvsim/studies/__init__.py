"""The questions that the commands answer: one step, a replay, what if, a sweep.

Each module takes values, runs the simulation, and returns one frozen result whose to_dict is what --json prints:
`explain_step` (one step on every route), `replay` (a trace step by step), `whatif` (a served trace under several
policies, run `side_by_side`), `sweep` (either, at every combination of settings), `capacity` (the traffic that servers
keep within `objectives`). `cells` are what sweeps and searches run over, `workers` who computes them. `timeline_check`
prices a sample of a run's steps again by simulation; `series` are a run's figures over time, `provenance` says what
they stand on. `shared_step` and `step_report` are parts of a step's report. `selection`, `several`, `tiers` and `lend`
ask about selected pages, several GPUs, tiers, and replicas that lend each other memory. Nothing here prints or draws.
"""
