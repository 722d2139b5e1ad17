"""Tells a user who waits that a first run compiles."""
from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import event

NOTICE = "pkvsim: compiling for this machine; the result is kept, so later runs start at once"
PATIENCE_S = 1.0  # of compiling, before it is worth a line


@contextmanager
def compile_notice() -> Iterator[None]:
    """Says once on stderr, be it a terminal or a pipe, that pkvsim's functions are being compiled, when that takes more
    than a moment. Loading them from the cache is no compiling."""
    with event.install_listener("numba:compile", _Notice()):
        yield


class _Notice(event.Listener):
    def __init__(self) -> None:
        self._since: float | None = None
        self._said = False

    def on_start(self, event: Any) -> None:
        if self._said or not event.data["dispatcher"].py_func.__module__.startswith("pkvsim."):
            return
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since > PATIENCE_S:
            self._said = True
            print(NOTICE, file=sys.stderr, flush=True)

    def on_end(self, event: Any) -> None:
        """Nothing to say."""
