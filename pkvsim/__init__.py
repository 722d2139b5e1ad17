"""PersistentKV's CPU half: shapes, schedules, reference attention, traces and the paper's policy."""
from pkvsim import reference
from pkvsim.options import AttentionOptions
from pkvsim.schedule.make import Schedule, make_schedule
from pkvsim.shapes import DecodeShape, StepState

__all__ = ["AttentionOptions", "DecodeShape", "Schedule", "StepState", "make_schedule", "reference"]

__version__ = "0.1.0"
