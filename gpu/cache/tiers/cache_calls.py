"""Whose calls a tiered cache takes, and which are under way: close() waits for those of other threads."""
from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator


class CacheCalls:
    """Calls of one cache in the process that opened it.

    lock: of the cache, notified when a call has ended. is_closed: no call begins any more.
    """

    __slots__ = ("is_closed", "_lock", "_process", "_under_way")

    def __init__(self, lock: threading.Condition) -> None:
        self.is_closed = False
        self._lock, self._process, self._under_way = lock, os.getpid(), 0

    @property
    def are_own(self) -> bool:
        """Whether this is the process that opened the cache. A process forked from it has none of its threads."""
        return os.getpid() == self._process

    def check_own(self) -> None:
        """ValueError in a process forked from the one that opened the cache: what it waits for would never come."""
        if not self.are_own:
            raise ValueError("cache: expected the process that opened it, got one forked from that")

    @property
    def lock(self) -> threading.Condition:
        """The lock, where it is safe to take: a forked process may have got it locked for good. ValueError there."""
        self.check_own()
        return self._lock

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """A call that uses disks and host memory. ValueError where the cache is closed."""
        begun = False
        try:
            with self.lock:
                if self.is_closed:
                    raise ValueError("cache: expected one that is open")
                self._under_way += 1
                begun = True
            yield
        finally:
            if begun:
                with self._lock:
                    self._under_way -= 1
                    self._lock.notify_all()

    def end(self) -> None:
        """Lets no call begin any more and waits for those under way."""
        with self.lock:
            self.is_closed = True
            self._lock.wait_for(lambda: not self._under_way)
