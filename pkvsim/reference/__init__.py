"""Float64 attention, append and RoPE: what every kernel is checked against."""
from pkvsim.reference.attention import attention, merge_states, run_schedule

__all__ = ["attention", "merge_states", "run_schedule"]
