"""Options that several commands take as one: a frozen dataclass each, whose fields are the options.

`group` gives a command the options of every such parameter; `server` says how the simulated server is set up, `tiers`
what it has beyond the GPU's pages, and pkvsim.commands.load_options where its requests come from.
"""
