"""Rows whose prompts begin with the same blocks read these once.

`grouping` finds such rows among those that decode, `share` prices a step in which they read together.
"""
