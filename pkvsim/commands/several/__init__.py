"""The parts of subcommands that several GPUs have to themselves.

`step_over_gpus` is `pkvsim step --kv-parallel`, `lend` is `pkvsim whatif --lend`.
"""
