"""PersistentKV's CPU half: shapes, schedules, reference attention, traces and the paper's policy."""
from pkvsim import reference
from pkvsim.options import AttentionOptions
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.schedule.make import Schedule, make_schedule
from pkvsim.schedule.prefixes import find_prefixes
from pkvsim.shapes import DecodeShape, StepState

__all__ = ["AttentionOptions", "DecodeShape", "PrefixGroups", "Schedule", "StepState", "find_prefixes", "make_schedule",
           "reference"]
