"""What callers hand in: arrays of torch or CuPy, block tables, and the checks on them.

`arrays` describes an array of any library without copying it, `block_tables` says where a step's lengths and page
ids are, `checks` refuses what no kernel could take, before any launch, naming the argument. `run` holds what a
planned step is run with, and the protocol of everything that plans and runs steps.
"""
