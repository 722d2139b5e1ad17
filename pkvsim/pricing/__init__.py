"""The closed form: what a step of one route costs, from its constants. Compiled.

Rows go in sorted by length; they are cut as the route cuts them, the tasks that result are timed on the CTA slots,
merges and launches are added, and the layer's time becomes a step's with the host's planning and issuing. No
schedule is built, so that a router can price every route in every step. The timeline prices the same tasks by
simulating them; tests hold the two against each other.
"""
