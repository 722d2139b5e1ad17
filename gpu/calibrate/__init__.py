"""python -m gpu.calibrate: measures a GPU into a device file."""
