"""PersistentKV's CPU half: the schedules that the kernels run, their float64 meaning, and what they cost.

Read `shapes` (a step's attention shape and its rows) and `options` (windows, sinks, 8-bit caches), then `schedule`:
the task decomposition is what everything else here talks about. `reference` says in float64 what any schedule must
compute. `selection` says which pages a step reads, where that is not all.

From there the data flows one way. `devices` and `models` hold numbers, `traces` requests. `pricing` turns a step's
rows into microseconds in closed form, `timeline` into a simulation of tasks on CTA slots; `outside` prices the rest of
a step, and `fitting` finds the constants of all three from measurements. `policy` compares prices and takes a route.
`memory` and `serving` decide which rows a step has. `studies` ask the questions, `reports` draw the answers,
`commands` are the words for both on the command line, and `cli` puts them together. `compiled` says how functions are
compiled and where that is kept, `kv_types` which types a cache may have.

Nothing here imports CuPy or torch. The GPU half imports this one: a decision is made here once, and called by both.
"""
from pkvsim import reference
from pkvsim.options import AttentionOptions
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.schedule.make import Schedule, make_schedule
from pkvsim.schedule.page_lists import PageList, list_schedule
from pkvsim.schedule.prefixes import find_prefixes
from pkvsim.shapes import DecodeShape, StepState

__all__ = ["AttentionOptions", "DecodeShape", "PageList", "PrefixGroups", "Schedule", "StepState", "find_prefixes",
           "list_schedule", "make_schedule", "reference"]

__version__ = "0.1.0"
