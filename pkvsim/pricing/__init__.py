"""The closed form: what a step of one route costs, from its constants. Compiled.

Read `constants` (what a route's numbers mean), `layer` (one layer on one route), `cuts` (how rows are cut),
`task_times` (how long tasks take), `rules` (one function for each way of scheduling), `prices` (a step on every
route), `step_times` (many layers and the host's part). `counters` counts bytes and launches, whatever the time.
`shared` (constants) and `shared_us` (the closed form) price rows that read their common pages once, `selected` those
that read a selection, and `kv_parallel` rows that lie on several GPUs.

    ordered = sorted_lengths(seq_lens)
    price_routes(ordered, heads_of(shape, num_sms), candidates, prices_us, splits)
    step_times(ordered, layers, candidates.constants, prices_us, gpu_us, host_us)
"""
