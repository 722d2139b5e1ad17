"""A capacity search as a table on stdout, a file of comma-separated values, and a web page.

`columns` says which figures a server is shown with, `table` prints them, `csv_file` writes them at full precision, and
`page` makes the self-contained page with charts.
"""
