"""Studies of selected pages.

`step` sets a step over lists beside those that read all pages, `cells` does so for a sweep, and `notes` says what a
reader must know of such figures.
"""
