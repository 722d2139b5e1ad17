"""An interrupt that lets a long run end with what it has found."""
from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_S = 3.0  # timeout(1) sends its signal to the process and then to its group, so to the process twice


@contextlib.contextmanager
def until_interrupted() -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT and SIGTERM only make the function that it is given return True; another one that comes
    REPEAT_S later or more raises KeyboardInterrupt. Call it from the main thread."""
    first_s: float | None = None

    def told(number: int, frame: FrameType | None) -> None:
        nonlocal first_s
        now_s = time.monotonic()
        if first_s is None:
            first_s = now_s
        elif now_s - first_s >= REPEAT_S:
            raise KeyboardInterrupt

    before = [signal.signal(number, told) for number in SIGNALS]
    try:
        yield lambda: first_s is not None
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)
