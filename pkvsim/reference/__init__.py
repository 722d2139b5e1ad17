"""Float64 attention, append and RoPE: what every kernel is checked against.

Read `attention`: it computes a step at once, and again tile by tile through a schedule, merging partial states as
the GPU does. `append` writes new tokens into pages, rotated by `rope` and rounded to the cache's type.
"""
from pkvsim.reference.attention import attention, merge_states, run_schedule

__all__ = ["attention", "merge_states", "run_schedule"]
