"""What a step costs outside paged decode attention, and by an engine's own decode attention where that is not ours.

Read `step` first: a step's work in, its parts in microseconds out, each with what it stands on. `matrices` prices
matrix products, `pairs` counts what attention sees, `flash_decode` prices the decode attention of FlashAttention 3,
`communication` the all-reduces of several GPUs. `step_costs` turns all of it into tables that compiled code adds up.
`engine_profile` says what a serving engine does around its steps, `derive` which constants a GPU has.
"""
