"""One subcommand of pkvsim a file; each imports what it needs when it runs, so that --help is quick.

Those are `devices`, `models`, `trace`, `step`, `replay`, `whatif`, `sweep`, `capacity` and `fit`. A command declares
its options, checks what was typed, calls a study and hands the result to a report. `shared_options` holds the options
that several take, `load_options` where requests come from, `serving_inputs` what whatif and sweep share, `options`
those that come as one value; `several` has what is said of several GPUs. `errors` is the one line that bad input ends
in.
"""
