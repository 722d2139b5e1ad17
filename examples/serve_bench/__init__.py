"""What bench_serve runs: decode steps against the memory's limit, kernel by kernel, and whole traces beside whatif."""
