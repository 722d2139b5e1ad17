"""From measured times to a device's constants.

Read `fit_device`, which goes through a table's routes, then `fit_routes`: robust least squares on the logarithm of
time, over a few ways of cutting rows, from the first values of `fit_starts`; `fit_steps` adds what a step alone and
its host take. `measurements` is the native table, `measured_tables` reads those that others publish.
"""
