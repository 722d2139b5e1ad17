"""Float64 attention, append and RoPE: what every kernel is checked against.

Read `attention`: it computes a step at once, and again tile by tile through a schedule, merging partial states as
the GPU does. `selected` does so over lists of pages, and says what every page gets of the attention. `append` writes
new tokens into pages, rotated by `rope` and rounded to the cache's type.
"""
from pkvsim.reference.attention import attention, merge_states, run_schedule
from pkvsim.reference.selected import fold_lists, page_lse, selected_attention

__all__ = ["attention", "fold_lists", "merge_states", "page_lse", "run_schedule", "selected_attention"]
