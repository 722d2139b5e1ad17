"""What a study looks like: tables, plots, a web page, a timeline file.

One module a form and subject, named so: table_*, plot_*. `grid` lays every table, so that no figure is cut; `plots` is
what pictures share, `html_page` one page to pass on, `perfetto` a file for the trace viewer, `capacity` the forms of a
capacity search, `export` files for other programs; `selection`, `several` and `tiers` have the lines of selected
pages, several GPUs and tiers. They take results of studies and compute no price of their own.
"""
