"""Which route a step takes, and why.

Read `decision` first: what a policy is given and what it answers. The calibrated policy takes the cheapest route by
the closed form and is the default; the oracle simulates every route; the fixed ones always take one; the paper's
applies its gates and its roofline (`paper_rules`). `by_name` is the one import for all of them. `choose` is the choice
itself, compiled, which the GPU's router makes too. `selecting` says whether a step's layers read selected pages.
"""
