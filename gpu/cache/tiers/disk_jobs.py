"""What a disk is asked to do, and what it has done."""
from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu.cache.tiers.device import Ticket


@dataclass(slots=True, eq=False)
class ReadJob:
    """A block to be read. take(buffers of blocks [n] int64, jobs) is called in the disk's thread with the blocks that
    have arrived, checked, of jobs that share it; it returns the ticket after which the buffers are free, None at once.
    ended(jobs, fault) follows, once for all of them, fault None where the blocks were handed over."""

    slot: int
    key: bytes
    tag: int
    take: Callable[[np.ndarray, list[ReadJob]], Ticket | None]
    ended: Callable[[list[Any], str | None], None]
    cancelled: bool = False


@dataclass(slots=True, eq=False)
class WriteJob:
    """A block to be written. fill(buffers [n], jobs) copies blocks of jobs that share it into the buffers and returns
    the ticket after which they are there; ended([job], fault) follows for each."""

    slot: int
    key: bytes
    tag: int
    fill: Callable[[np.ndarray, list[WriteJob]], Ticket]
    ended: Callable[[list[Any], str | None], None]


@dataclass(slots=True)
class DiskCounts:
    """What a disk has done: blocks, bytes of blocks, and seconds in which something was under way."""

    read: int = 0
    written: int = 0
    faults: int = 0
    busy_s: float = 0.0
    thread_s: float = 0.0  # processor time of its thread
    last_fault: str = ""


def groups(jobs: list, name: str) -> list[list]:
    """Jobs by their equal attribute of that name, in order."""
    found: dict[object, list] = {}
    for job in jobs:
        found.setdefault(getattr(job, name), []).append(job)
    return list(found.values())


def error_name(number: int | None) -> str:
    """An errno as its name and what it means; EIO where there is none."""
    number = number or errno.EIO
    return f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"
