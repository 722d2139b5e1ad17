"""Which pages a (row, KV head) reads, or keeps: the rules of page selection, in float64.

Read `rules` first: every method scores pages, aggregates the scores over the query heads that share a KV head, pins
some pages, and takes as many as a budget says into a sorted list. `summaries` are what pages are scored by without
being read. Then each method is a file: what it scores, aggregates, pins and budgets, and the paper that says so.
`by_name` finds them. The GPU half (gpu.selection) takes pins, budgets and defaults from here.
"""
from pkvsim.selection.rules import Budget, Pins, top_pages, top_share

__all__ = ["Budget", "Pins", "top_pages", "top_share"]
