"""Requests: the paper's families and files, the traces that others publish, and loads without a file.

Read `requests` first: a RequestTrace is what arrives when, how long it is, and which prompt blocks it shares. A
file comes in from the bottom: `sources` opens it (plain, compressed or piped), `rows` cuts it into records,
`columns` checks them a chunk at a time, `formats` knows each publisher's names (with `time_units` and
`prompt_hashes` for what they leave open), and `readers` puts a trace together. `synthetic` makes one from
`distributions` instead; `paper_families` and `paper_files` are the paper's own. `summary` describes any of them.
"""
