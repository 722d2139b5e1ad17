"""KV blocks beyond the GPU's pages: pinned host memory and disks, read all at once.

Read in this order: `tiered_cache` is the face, whose calls `block_arguments` checks and `cache_calls` keeps apart;
`handles` is what its callers wait on, and `load_parts` says which part of a load comes from where, and who asks for it.
`device` says what they ask of the GPU's pages, `transfer` is that for CUDA, over kernels and `gpu.cache.dma`, and
`cuda_sums` tells blocks of disks again (`event_ticket` is how both wait). The folder `disks` keeps disks busy,
`open_disk` opens one; `host_arena` is pinned memory, and `host_room` knows how much is free. `stores` is what a cache
is told of its tiers. What goes where is decided by pkvsim.memory, which also has the sums, and which way to the GPU by
pkvsim.devices.copy_way. Only `transfer` and `cuda_sums` need CuPy.
"""
