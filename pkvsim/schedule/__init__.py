"""Task lists: which tiles of which row every CTA takes, and where each partial state goes.

Read `make` first: make_schedule is the one way in, and what it returns is what the GPU runs, the timeline simulates
and the reference computes. `costs` says what the balanced schedule weighs; `fill` holds the compiled loops that
write tasks. The balanced arithmetic is the specification of cuda_src/plan.cuh, which must equal it task for task.
"""
