"""Which pages a (row, KV head) reads, or keeps: the rules of page selection, in float64.

Read `rules` first: every method scores pages, aggregates the scores over the query heads that share a KV head, pins
some pages, and takes as many as a budget says into a sorted list. `summaries` are what pages are scored by without
being read, `centroids` one form of them. `masses` are what they got when they were. `methods` has a file for each
published one; `by_name` finds those that the GPU scores. `budgets` are shared by heads and layers. `served` says which
layers can select at all, `setup` what a command's METHOD:BUDGET means. `evictions` say what a prompt keeps, for a pool
to give back the rest (pkvsim.memory.page_allocator). The GPU half (gpu.selection) takes pins, budgets and defaults from
here.
"""
from pkvsim.selection.rules import Budget, Pins, top_pages, top_share

__all__ = ["Budget", "Pins", "top_pages", "top_share"]
