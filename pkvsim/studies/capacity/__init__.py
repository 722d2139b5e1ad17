"""How much traffic a server keeps within objectives, what that takes and costs.

`bisection` finds the edge between kept and missed rates, `expected_edge` tells it where to look, `search` runs it over
every server of the axes, `result` is what comes back, best server first.
"""
