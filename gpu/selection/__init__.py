"""Page selection on the GPU: which pages each (row, KV head) reads in a step, without the host.

Read `page_selector`: it scores the pages of a planned step by their `page_summaries`, or takes scores that somebody
else has, and leaves lists that DecodeEngine.run(selected=...) reads. Methods, pins and budgets are pkvsim.selection's;
`step_rule` says which steps are long enough for lists to pay, `variant` which shapes the kernels serve and how they
are cut. `paged_selection` puts all of it together for a model, layer by layer, as the caches of gpu.drop_ins use it.
"""
