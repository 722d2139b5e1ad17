"""Files of a run for other programs to read.

`requests_csv` writes a line for every request; the times are seconds from the first arrival.
"""
