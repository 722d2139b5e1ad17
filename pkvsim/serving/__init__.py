"""A simulated server: what runs in every step, and what it costs.

Read `server_config` (what is set), then `simulate` (the whole run), then `loop`: every turn asks the scheduler who
decodes, who prefills and who gives way, and adds up what the step costs. `queueing` says who sends what when and who
waits, `orders` who goes first; `shared` says which rows read their common blocks once; `replicas` puts several servers
behind a router, `apart` prompts and decoding on servers of their own. State travels as named tuples of arrays, as
compiled code takes them; `prompt_blocks` numbers what prompts share, and `result` turns the logs into percentiles and
shares.
"""
