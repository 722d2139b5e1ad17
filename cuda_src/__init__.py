"""CUDA C++ sources of PersistentKV. `gpu.kernels` is the only reader."""
