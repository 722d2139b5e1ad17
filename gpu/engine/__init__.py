"""The engines that run our schedules: plan notes where things are, run launches.

Read `schedule_engine`, then follow a step: plan() leaves a `plan`, run() turns arrays into `arguments` and launches
one of the `decode_kernels`. `task_list` carries host-planned schedules to the GPU, and reads back what it planned
itself; `cache_scales` are the scales of 8-bit pages on their way into a launch. Rows with common pages: `prefixes`
finds them, `step_groups` is what a plan knows of them, `shared_reads` what launches them. `page_lists` adds what a run
over lists gives its kernel.
"""
