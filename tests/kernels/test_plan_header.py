"""The device's schedule is pkvsim's, task for task: cuda_src/plan.cuh, built for the CPU, against make_schedule."""
import ctypes

import numpy as np
import pytest
from cpp import STRICT, build
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paths import SUPPORT

from gpu.kernels.variant import TILE_TOKENS
from pkvsim import DecodeShape, make_schedule
from pkvsim.schedule.costs import BalancedCosts
from pkvsim.schedule.make import TASK_DTYPE

HARNESS = SUPPORT / "plan_harness.cpp"

lengths = st.one_of(st.just(0), st.sampled_from([1, 15, 16, 17, 32, 4096, 131072]), st.integers(0, 64),
                    st.integers(0, 4096), st.integers(0, 131072))
few_rows = st.lists(lengths, min_size=0, max_size=6)
many_rows = st.lists(st.one_of(st.just(0), st.integers(0, 300)), min_size=30, max_size=200)
equal_rows = st.builds(lambda length, rows: [length] * rows, lengths, st.integers(1, 40))  # heads that may be cut alike


class Costs(ctypes.Structure):  # pkv::Costs
    _fields_ = [(name, ctypes.c_int) for name in BalancedCosts._fields]


@pytest.fixture(scope="session")
def list_balanced(tmp_path_factory):
    """(lens, num_kv_heads, costs, window, num_ctas)
    -> the header's (tasks, cta_offsets)."""
    built = tmp_path_factory.mktemp("plan") / "plan_harness.so"
    # Signed overflow is caught rather than wrapped: the header's sums must stay within 32 bits.
    function = build(HARNESS, built, *STRICT, "-DWINDOWED=1", "-ftrapv").list_balanced

    def call(lens, num_kv_heads, costs, window, num_ctas):
        lens = np.array(lens, np.int32)
        tasks = np.zeros(len(lens) * num_kv_heads + num_ctas, TASK_DTYPE)
        offsets = np.zeros(num_ctas + 1, np.int32)
        pointer = ctypes.c_void_p
        ranges = function(
            pointer(lens.ctypes.data),
            len(lens),
            num_kv_heads,
            Costs(*costs),
            2**31 - 1 if window is None else window,
            num_ctas,
            pointer(tasks.ctypes.data),
            len(tasks),
            pointer(offsets.ctypes.data),
        )
        assert offsets[ranges] <= len(tasks)
        return tasks[: offsets[ranges]], offsets[: ranges + 1]

    return call


@settings(max_examples=1000, deadline=None)
@given(
    lens=st.one_of(few_rows, many_rows, equal_rows),
    num_kv_heads=st.sampled_from([1, 2, 3, 4, 8, 16]),
    costs=st.builds(
        BalancedCosts, st.integers(0, 12), st.integers(1, 40), st.integers(0, 12), st.just(0) | st.integers(0, 300)
    ),
    window=st.one_of(st.none(), st.sampled_from([1, 16, 17, 4096]), st.integers(1, 300)),
    num_ctas=st.integers(1, 300),
)
@example(lens=[], num_kv_heads=8, costs=BalancedCosts(2, 4, 0, 0), window=None, num_ctas=132)
@example(
    lens=[0, 0, 0], num_kv_heads=8, costs=BalancedCosts(2, 4, 0, 0), window=None, num_ctas=132
)
@example(
    lens=[8192], num_kv_heads=8, costs=BalancedCosts(2, 4, 0, 0), window=None, num_ctas=132
)  # heads cut alike: 128 of 132
@example(
    lens=[1000], num_kv_heads=7, costs=BalancedCosts(0, 1, 0, 0), window=None, num_ctas=132
)  # cut alike: 126 of 132
@example(
    lens=[1000], num_kv_heads=100, costs=BalancedCosts(0, 1, 0, 0), window=None, num_ctas=132
)  # a multiple would idle 1/4: not
@example(
    lens=[87040], num_kv_heads=2, costs=BalancedCosts(0, 1, 0, 0), window=None, num_ctas=17
)  # ranges of 640 tiles: not short
@example(
    lens=[87024], num_kv_heads=2, costs=BalancedCosts(0, 1, 0, 0), window=None, num_ctas=17
)  # of 639: short
@example(
    lens=[131072] * 64, num_kv_heads=16, costs=BalancedCosts(12, 1, 0, 0), window=None, num_ctas=300
)
@example(
    lens=[1024], num_kv_heads=8, costs=BalancedCosts(8, 8, 3, 0), window=None, num_ctas=132
)  # five parts of a head
@example(
    lens=[2**27], num_kv_heads=1, costs=BalancedCosts(0, 1, 1024, 0), window=None, num_ctas=300
)  # longer than the root reaches
@example(
    lens=[2048] * 8, num_kv_heads=8, costs=BalancedCosts(7, 8, 2, 80), window=None, num_ctas=132
)  # short, and whole heads for half the CTAs
@example(
    lens=[2048] * 3, num_kv_heads=8, costs=BalancedCosts(7, 8, 2, 80), window=None, num_ctas=132
)  # equal parts would idle more than 1/8 of half the CTAs
@example(
    lens=[0, 16, 0, 131072, 0], num_kv_heads=8, costs=BalancedCosts(3, 1, 0, 0), window=None, num_ctas=300
)
def test_header_lists_the_tasks_of_pkvsim(
    list_balanced, lens, num_kv_heads, costs, window, num_ctas
):
    tasks, cta_offsets = list_balanced(
        lens, num_kv_heads, costs, window, num_ctas
    )
    expected = make_schedule(
        "balanced",
        DecodeShape(num_kv_heads, num_kv_heads, 128, 16),
        lens,
        num_ctas=num_ctas,
        costs=costs,
        window=window,
        tile_tokens=TILE_TOKENS,
    )
    np.testing.assert_array_equal(cta_offsets, expected.cta_offsets)
    np.testing.assert_array_equal(tasks, expected.tasks)
