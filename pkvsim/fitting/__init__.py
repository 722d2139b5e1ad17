"""From measured times to a device's constants.

Read `fit_device`, which goes through a table's routes, then `fit_routes`: robust least squares on the logarithm of
time, over a few ways of cutting rows, from the first values of `fit_starts`; `fit_steps` adds what a step alone and
its host take. `measurements` is the native table, `measured_tables` reads those that others publish.

Other constants have fits of their own: `fit_shared` those of rows that read together, `selection` those of selected
pages. What a step costs outside attention comes from kernels (`outside_table`, `fit_outside`), from an engine's steps
(`fit_step_tables`) or from published points (`serving_points`, `fit_serving`), which `closed_loop` plays.
"""
