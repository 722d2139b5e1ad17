"""What several GPUs do together.

`kv_parallel` is one step whose rows' pages lie on several GPUs: every rank's part, and what the merge adds.
"""
