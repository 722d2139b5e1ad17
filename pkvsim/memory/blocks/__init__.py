"""What a block of a prompt's KV is: its name, its sums and its place.

`block_keys` names blocks by their tokens and all before them, once for the scheduler and for every tier; `block_sums`
says whether a block is the one that was stored; `block_index` knows where each block is and who uses it.
"""
