"""Who owns which page, and which blocks of KV are kept where.

`page_allocator` hands pages to rows and takes them back; the GPU's pool calls it. `prefix_cache` is the simulated
server's: blocks of prompts named by hashes, who uses them, and which goes when pages are short.

The pool beyond a GPU's pages: `tiers` says what devices there are and `tier_presets` whole machines of them,
`placement` which device a block goes to, `retention` which one goes, and `load_or_recompute` how much of a prompt is
worth loading. `blocks` says what a block is: its key, its sums, and where it lies and who uses it. `restarts` says what
of host memory goes to disks before a pool closes. `memory_pool` is the face that the simulator (`simulate_tiers`, and
the serving loop) and the GPU's tiered cache both call, so that they decide alike. `tier_options` are the choices,
`device_clock` says when simulated devices have done their work; how blocks cross to a GPU and back is
pkvsim.devices.copy_way's.
"""
