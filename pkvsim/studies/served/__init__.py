"""Steps that a server of this project has run: their prices beside what they took, and constants fitted to them.

`steps` has the steps and reads files of examples/bench_serve.py, `prices` prices them as whatif does, `fit` fits the
constants of a step outside paged decode attention to them.
"""
