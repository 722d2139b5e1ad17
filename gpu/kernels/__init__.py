"""From cuda_src to a launch: which variant, compiled once, launched through the driver.

`variant` chooses the compile-time constants of a shape (by the tables of `tuned` where they know it), `compile` is the
only caller of the compiler, `launch` packs arguments (the table of `fields`) and calls the driver once. `this_gpu` is
the one place that says what the GPU at hand is.
"""
