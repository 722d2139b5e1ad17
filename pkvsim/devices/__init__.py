"""GPUs: what each is, what its routes cost, and how one that nobody measured is derived.

Read `device` (a GPU's own numbers, each with its source, in one JSON file of catalogue/), then `route_model` (the
named constants that price one route on it). `derive` scales a calibrated GPU's constants to another's datasheet;
`route_options` says which route serves which attention. `outside_constants` price the rest of a step and
`selection_constants` the choice of pages; both are parts of a device file too. `copy_way` says which way KV
blocks go between host memory and a GPU's pages.
"""
