"""What several GPUs do together, as text.

`table_kv_parallel` shows a step whose rows' pages several GPUs hold, `table_lend` replicas that lend each other memory.
"""
