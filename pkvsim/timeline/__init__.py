"""The simulation: a step's tasks on CTA slots that share the bandwidth.

Read `timeline`: a schedule becomes tasks with bytes, launches and slots; the compiled `event_loop` runs them, each at
the lesser of a CTA's own rate and its share, and finds the next in a `heap`. `time_split` lays every moment to what
bounds it. `shared` simulates rows that read their common pages once, whose CTAs have speeds of their own
(`range_loop`).
"""
