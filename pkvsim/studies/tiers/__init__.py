"""Studies of pages beyond the GPU: axes of sweeps, notes of reports, and decode that reads tiers."""
