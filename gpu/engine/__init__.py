"""The engines that run our schedules: plan notes where things are, run launches.

Read `schedule_engine`, then follow a step: plan() leaves a `plan`, run() turns arrays into `arguments` and launches
one of the `decode_kernels`. `task_list` carries host-planned schedules to the GPU, and reads back what it planned
itself; `cache_scales` are the scales of 8-bit pages on their way into a launch.
"""
