"""A warp's plan of lengths that change while it is made (warp_plan.cuh): of no row that is not there, and it ends."""
from __future__ import annotations

import ctypes

import numpy as np
import pytest
from cpp import STRICT, build
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SUPPORT

RANGES, MOST = 9, 400


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    built = tmp_path_factory.mktemp("plan") / "plan_warp_harness.so"
    function = build(SUPPORT / "plan_warp_harness.cpp", built, *STRICT, "-Wno-unknown-pragmas", "-Wno-unused-function",
                     f"-I{SUPPORT}").plan_while_lengths_change  # fmt: skip
    function.restype = ctypes.c_char_p

    def call(before: list[int], later: list[int], which: int) -> tuple[int, int, int]:
        arrays = (np.array(before, np.int32), np.array(later, np.int32),
                  np.array([len(before), 2, RANGES, which, MOST], np.int32), np.zeros(3, np.int32))
        complaint = function(*(ctypes.c_void_p(array.ctypes.data) for array in arrays))
        assert complaint is None, complaint
        return tuple(arrays[3].tolist())

    return call


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 100), which=st.integers(0, RANGES - 1))
def test_a_plan_ends_whatever_lengths_become(plan, data, rows, which) -> None:
    lengths = st.lists(st.one_of(st.integers(0, MOST), st.integers(-(2**31), 2**31 - 1)), min_size=rows, max_size=rows)
    row, x0, x_end = plan(data.draw(lengths), data.draw(lengths), which)
    assert x0 >= x_end or 0 <= row < rows


def test_lengths_past_the_32nd_become_shorter(plan) -> None:
    row, x0, x_end = plan([90] * 40, [90] * 32 + [0] * 8, RANGES - 1)
    assert x0 >= x_end  # nothing is left to do; that lengths changed is found before anything counts
