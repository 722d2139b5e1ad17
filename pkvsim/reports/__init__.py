"""What a study looks like: tables, plots, a web page, a timeline file.

One module a form and subject, named so: table_*, plot_*. `plots` is what pictures share, `series` what pictures and
pages show of a run, `html_page` one page to pass on, `perfetto` a file for the trace viewer. They take results of
studies and compute no price of their own.
"""
