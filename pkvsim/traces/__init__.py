"""Requests: the paper's families and files, and the traces that others publish.

Read `requests` first: a RequestTrace is what arrives when, how long it is, and which prompt blocks it shares.
`readers` make one from a file, recognised by its content, through the checked `columns`. `paper_families` and
`paper_files` are the paper's own; `summary` describes a trace, `prompt_blocks` numbers its shared blocks for the
prefix cache.
"""
