"""What callers hand in: arrays of torch or CuPy, block tables, and the checks on them."""
