"""A fake GPU with streams, which all ranks of a test share."""
from __future__ import annotations

import contextlib
import types

import numpy as np
import pytest
from fake_gpu import FakeArray, fake_gpu, memory


@pytest.fixture(scope="module")
def gpu():
    with fake_gpu(num_sms=12) as gpu:
        @contextlib.contextmanager
        def entered():
            yield

        class Device:
            id, synchronize = 0, staticmethod(lambda: None)

            def __init__(self, index: int = 0) -> None:
                pass

            def __enter__(self):
                return self

            def __exit__(self, *_):
                return None

        stream = types.SimpleNamespace(ptr=0, synchronize=lambda: None)

        class Stream:
            ptr = 0

            def __init__(self, **_) -> None:
                pass

            def synchronize(self) -> None:
                pass

            def __enter__(self):
                return self

            def __exit__(self, *_):
                return None

        cuda = gpu.cupy.cuda
        cuda.Device, cuda.Stream, cuda.get_current_stream = Device, Stream, lambda: stream
        cuda.alloc_pinned_memory = lambda size: bytearray(size)
        cuda.runtime.getDeviceCount = lambda: 1
        cuda.runtime.memset = lambda at, value, size: memory(at, np.uint8, (size,)).fill(value)
        FakeArray.fill = lambda self, value: self.host.fill(value)
        gpu.cupy.ndarray = FakeArray
        yield gpu
        del FakeArray.fill
