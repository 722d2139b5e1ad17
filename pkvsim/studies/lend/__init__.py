"""Replicas that may lend each other memory: when one's KV pages run out, does it borrow, preempt, move or recompute?

Read `prices` (what each way costs), `cluster` (who holds which pages) and `run` (the replicas' steps in order of time).
"""
