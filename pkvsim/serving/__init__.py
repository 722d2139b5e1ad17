"""A simulated server: what runs in every step, and what it costs.

Read `server_config` (what is set), then `simulate` (the whole run), then `loop`: every turn asks the scheduler who
decodes, who prefills and who gives way, and adds up what the step costs (`costs`, of decode attention `attention`).
`queueing` says who sends what when and who waits, `orders` who goes first. `shared` says which rows read their common
blocks once, `selection` which steps read selected pages, `tiers` what is loaded from beyond the GPU, of which the loop
knows a `tier_gate`. `replicas` puts several servers behind a router, `apart` prompts and decoding on servers of their
own. State (`state`) travels as named tuples of arrays, as compiled code takes them; `prompt_blocks` numbers what
prompts share, and `results` turns the logs into percentiles and shares.

`live` makes the same decisions (`scheduling`) for a server whose requests are not known beforehand. `fit_model` says
whether a model and its pages fit a GPU at all.
"""
