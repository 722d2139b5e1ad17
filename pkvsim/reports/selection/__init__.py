"""Selected pages on stdout: what their prices are fitted to, and what selecting is worth in a step.

`table_fit` compares measured cells with a fit; `lines` are the sentences below a step's table.
"""
