"""Servers whose decode steps read selected pages.

`memory` says which layers of a model select and what the summaries of their pages take, `pages` prices a step that
selects and counts what it saved.
"""
