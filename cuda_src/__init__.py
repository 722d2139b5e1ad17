"""CUDA C++ sources of PersistentKV. `gpu.kernels` is the only reader.

Read plan.cuh first: the balanced arithmetic in integers, which a CPU test compares with pkvsim.schedule task for
task. Then attend.cuh, the one decode path of every schedule: a CTA walks a stream of segments and yields a partial
softmax state for each. Below it lie the stream of tiles from pages into shared memory (paged_load.cuh, table.cuh),
the operands and products (fragments.cuh, query.cuh, mma.cuh), the softmax (weights.cuh) and the states with their
merge (state.cuh). On top stands one .cu per kernel: balanced.cu plans and merges within its launch, decode.cu takes
a task list and merge.cu merges after it, append.cu writes the cache, plan.cu lists what balanced.cu would do,
stream.cu measures the limit.

Every compile-time constant (-D) is set by gpu.kernels.variant; a kernel's header says its grid, its arrays and what
bounds its speed.
"""
