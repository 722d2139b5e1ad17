"""What a launch hands to the driver: each parameter where and as C has it, grids and streams; errors."""
from __future__ import annotations

import ctypes
import re
import struct
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu.kernels import launch
from gpu.kernels.launch import Arguments, Kernel

C_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "q": ctypes.c_longlong, "f": ctypes.c_float}
VALUES = {"p": st.integers(0, 2**64 - 1), "i": st.integers(-(2**31), 2**31 - 1),
          "q": st.integers(-(2**63), 2**63 - 1), "f": st.floats(width=32, allow_nan=False)}
PARTS = st.lists(st.sampled_from("piqf") | st.text("piqf", min_size=1, max_size=9).map("[{}]".format), min_size=1,
                 max_size=6)


def parameters(signature: str) -> list[type[ctypes.Structure]]:
    """Each parameter as a C structure."""
    return [type("Parameter", (ctypes.Structure,),
                 {"_fields_": [(f"field{index}", C_TYPES[letter]) for index, letter in enumerate(part.strip("[]"))]})
            for part in re.findall(r"\[\w+\]|\w", signature)]


def read(signature: str, starts: list[int]) -> list:
    """The values of a signature, field by field, from where its parameters start."""
    found = []
    for kind, start in zip(parameters(signature), starts, strict=True):
        assert start % ctypes.alignment(kind) == 0
        found += [getattr(kind.from_address(start), name) or 0 for name, _ in kind._fields_]
    return found


@st.composite
def launches(draw) -> tuple[str, list[list]]:
    """A signature and the values of some launches."""
    signature = "".join(draw(PARTS))
    one = st.tuples(*(VALUES[letter] for letter in signature if letter not in "[]"))
    return signature, draw(st.lists(one, min_size=1, max_size=3))


@settings(max_examples=300, deadline=None)
@given(launches())
def test_arguments_lie_as_in_c(drawn) -> None:
    signature, steps = drawn
    arguments = Arguments(signature)
    ends = [start + ctypes.sizeof(kind) for start, kind in zip(arguments.starts, parameters(signature))]
    assert max(ends) <= arguments.starts[0] + arguments.num_bytes
    assert all(end <= start for end, start in zip(ends, arguments.starts[1:])), "parameters overlap"
    for values in steps:
        arguments.write(*values)
        assert read(signature, arguments.starts) == list(values)


@pytest.mark.parametrize("signature", ["[pif]", "[ppfqi]", "[i]", "[ppppppppppqqiiiiiiiiiffppqiifp]"])
def test_one_structure_is_as_large_as_cs_on_8_bytes(signature) -> None:
    (kind,) = parameters(signature)
    assert Arguments(signature).num_bytes == -(-ctypes.sizeof(kind) // 8) * 8


class Driver:
    """Notes launches as cuLaunchKernelEx would read them; fails on request."""

    def __init__(self) -> None:
        self.signature, self.seen, self.status = "", [], 0
        self.attributes: list[tuple[int, tuple]] = []  # of the last launch

    def cuLaunchKernelEx(self, config, handle, pointers, extra) -> int:
        config = config._obj
        self.attributes = [(config.attributes[i].id, tuple(config.attributes[i].value))
                           for i in range(config.num_attributes)]
        if self.status == 0:
            self.seen.append((tuple(config.grid), tuple(config.block), config.shared_bytes, config.stream or 0,
                              config.num_attributes, handle.value, extra, read(self.signature, list(pointers))))
        return self.status

    def cuGetErrorName(self, status, name) -> int:
        name._obj.value = b"CUDA_ERROR_OF_TEST"
        return 0


@pytest.fixture()
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    return driver


def make_kernel(driver: Driver, signature: str) -> Kernel:
    driver.signature = signature
    return Kernel(types.SimpleNamespace(ptr=77), signature, threads=256, shared_bytes=4096, overlap=True)


def test_every_launch_has_its_own_grid_stream_and_arguments(driver) -> None:
    kernel = make_kernel(driver, "[pqf]ii")
    steps = [(132, (2**40, -5, 0.5, 1, 2), 9), ((8, 3), (2**63, 6, -0.5, 3, 4), 2**47), (1, (0, 0, 0.0, 0, 0), 0)]
    for grid, values, stream in steps:
        kernel(grid, values, stream)
        wanted = (*(grid if isinstance(grid, tuple) else (grid, 1)), 1)
        assert driver.seen[-1] == (wanted, (256, 1, 1), 4096, stream, 1, 77, None, list(values))


def test_an_even_grid_goes_in_pairs_where_asked_to(driver) -> None:
    """The numbers are CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION and _CLUSTER_DIMENSION of cuda.h."""
    driver.signature = "i"
    function = types.SimpleNamespace(ptr=77)
    kernel = Kernel(function, "i", threads=256, shared_bytes=4096, overlap=True)
    overlapping, paired = (6, (1, 0, 0)), (4, (2, 1, 1))
    for grid, wanted in ((132, [overlapping, paired]), (7, [overlapping]), (2, [overlapping, paired])):
        kernel(grid, (1,), 0, pairs=True)
        assert driver.attributes == wanted
        kernel(grid, (1,), 0)
        assert driver.attributes == [overlapping]
    Kernel(function, "i", threads=256, shared_bytes=4096, overlap=False)(2, (1,), 0, pairs=True)
    assert driver.attributes == []


def test_arguments_are_picked_from_what_is_given(driver) -> None:
    driver.signature = "[pi]i"
    kernel = Kernel(types.SimpleNamespace(ptr=77), "[pi]i", threads=256, shared_bytes=0, overlap=False, order=(3, 0, 1))
    kernel(2, (5, -6, 0.25, 2**40), 3)
    assert driver.seen[-1][-1] == [2**40, 5, -6]


@pytest.mark.parametrize("values", [(1, 2), (1, 2, 3.0, 4), (1, 2**31, 3.0), (1, 2.5, 3.0), (None, 2, 3.0)])
def test_values_that_do_not_fit_are_not_launched(driver, values) -> None:
    kernel = make_kernel(driver, "pif")
    with pytest.raises(struct.error):
        kernel(1, values, 0)
    assert not driver.seen
    kernel(2, (5, -6, 0.25), 3)
    assert driver.seen[-1][-1] == [5, -6, 0.25]


def test_a_refused_launch_is_named_and_the_next_one_goes_through(driver) -> None:
    kernel = make_kernel(driver, "i")
    driver.status = 1
    with pytest.raises(RuntimeError, match="CUDA_ERROR_OF_TEST"):
        kernel((4, 5), (3,), 6)
    driver.status = 0
    kernel(7, (8,), 0)
    assert driver.seen == [((7, 1, 1), (256, 1, 1), 4096, 0, 1, 77, None, [8])]
