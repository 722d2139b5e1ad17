"""From cuda_src to a launch: which variant, compiled once, launched through the driver."""
