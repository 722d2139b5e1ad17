"""Requests before and between their steps.

`clients` says who sends what when, `waiting` is the queue, `giving_way` who makes room, and `pages` what a request
holds of the pool and what is kept for the next turn of its conversation. `drafts` says how many tokens a row gives
whose drafts are checked. All compiled, and called by the scheduler.
"""
