"""Task lists: which tiles of which row every CTA takes, and where each partial state goes.

Read `task_list` first: a Schedule is what the GPU runs, the timeline simulates and the reference computes. `make` is
the one way to get one: it hands a step to `queue` (split and workqueue), to `balanced`, or, where rows have leading
pages in common, to `spans`. `costs` says what the balanced schedule weighs; `groups` says which rows share pages,
`prefixes` finds out, and `prefix_trees` holds the part of its rule that a serving loop asks; `fill` holds the compiled
loops that write tasks. `page_lists` cuts lists of selected pages like rows of their own; `shares` deals a row's pages
out to several GPUs.

The balanced arithmetic is the specification of cuda_src/plan.cuh, and `spans` that of its headers for shared reads:
they must equal it task for task.
"""
