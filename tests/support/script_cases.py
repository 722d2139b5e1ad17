"""What the tests of the GPU's scripts take for granted of a machine with one."""
SHAPE = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16}
ABOUT = {
    "gpu": "NVIDIA H200",
    "driver": "580",
    "torch": "2.11",
    "cuda": "13.0",
    "cupy": "14.2",
    "flashinfer": "0.7.2",
    "source_hash": "0",
    "command": "python -m  gpu.calibrate",
    "date": "2026-11-21T10:00:00+00:00",
}
