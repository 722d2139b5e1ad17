"""python -m gpu.calibrate: measures a GPU into a device file.

`run` is the whole of it: `constants` measures the GPU's own numbers, `cells` says which steps are timed, `measure`
times every route on them, and pkvsim.fitting turns the times into constants. `tiers` adds host memory, disks and the
link to them (--tiers), by `tier_rates`. `outside` measures what a step costs outside paged decode attention
(--outside): `outside_kernels` one by one, `outside_attention` by what runs here, `outside_layers` whole, to be held
against.
"""
