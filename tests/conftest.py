"""Hypothesis without a deadline: the first example of a test may be the one that compiles what it calls, for seconds."""
from __future__ import annotations

try:
    from hypothesis import settings
except ImportError:  # a machine that runs the GPU's tests alone needs none
    pass
else:
    settings.register_profile("pkvsim", deadline=None)
    settings.load_profile("pkvsim")
