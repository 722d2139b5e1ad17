"""Prices of selected pages (pkvsim.pricing.selected) from measured steps.

`cells` reads what examples/bench_selection.py wrote, `fit_selection` finds the constants and how far they are off.
"""
