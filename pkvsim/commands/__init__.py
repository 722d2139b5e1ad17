"""One subcommand of pkvsim a file; each imports what it needs when it runs, so that --help is quick.

A command declares its options, checks what was typed, calls a study and hands the result to a report.
`shared_options` holds the options that several take, `load_options` where requests come from, `serving_inputs` what
whatif and sweep share, `errors` the one line that bad input ends in.
"""
