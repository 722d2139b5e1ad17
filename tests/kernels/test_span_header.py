"""The device's schedule with shared reads is pkvsim's, task for task: cuda_src/spans.cuh, built for the CPU."""
import ctypes

import numpy as np
import nvrtc
import pytest
from cpp import STRICT, build
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paths import SUPPORT
from shared_cases import SharedBatch, balanced_costs, shared_batches
from slow import slow_unless

from gpu.kernels.compile import SOURCE_DIR, compile_options
from gpu.kernels.variant import TILE_TOKENS
from pkvsim import DecodeShape, make_schedule
from pkvsim.schedule.costs import MEASURED_COSTS, BalancedCosts, SharedCosts
from pkvsim.schedule.groups import PrefixGroups

FIELDS = ("group", "read", "members", "row", "kv_head", "split", "tile_begin", "tile_end")
LISTED = np.dtype([(name, np.int32) for name in FIELDS])
LLAMA = DecodeShape(32, 8, 128, 16)
OUTPUTS = SharedCosts(64, 12, 12, 3, 4)


def case(lens, group_of_row, pages, shape=LLAMA, shared_costs=SharedCosts()):
    return SharedBatch(shape, lens, PrefixGroups(group_of_row, pages), 1, TILE_TOKENS, shared_costs)


def numbers_of(batch, costs, num_ctas):
    """The harness's integers, in its order."""
    shape = batch.shape
    sizes = (len(batch.lens), len(batch.groups.prefix_pages), shape.num_kv_heads, batch.columns, batch.query_tokens)
    return np.array([*sizes, shape.page_size, num_ctas, *costs, *batch.shared_costs], np.int32)


def expected_listing(schedule, groups):
    """The schedule's tasks as the device lists them."""
    shared, tasks = schedule.shared, np.zeros(len(schedule.tasks), LISTED)
    for name in schedule.tasks.dtype.names:
        tasks[name] = schedule.tasks[name]
    if shared is None:
        tasks["group"] = tasks["read"] = -1
        tasks["members"] = 1
        return tasks
    reads = shared.reads[np.maximum(0, shared.read_of_task)]
    first = np.searchsorted(shared.reads["group"], np.arange(len(groups.prefix_pages)))
    of_read = shared.read_of_task >= 0
    tasks["group"] = np.where(of_read, reads["group"], -1)
    tasks["read"] = np.where(of_read, shared.read_of_task - first[reads["group"]], -1)
    tasks["members"] = np.where(of_read, reads["member_end"] - reads["member_begin"], 1)
    return tasks


@pytest.fixture(scope="session")
def list_spans(tmp_path_factory):
    """(batch, costs, num_ctas) -> (tasks, cta_offsets, parts)."""
    built = tmp_path_factory.mktemp("spans") / "span_harness.so"
    # Signed overflow is caught rather than wrapped: the header's sums must stay within 32 bits.
    function = build(SUPPORT / "span_harness.cpp", built, *STRICT, "-ftrapv").list_spans

    def call(batch, costs, num_ctas):
        lens, rows, heads = np.array(batch.lens, np.int32), len(batch.lens), batch.shape.num_kv_heads
        tasks = np.zeros(rows * 2 * heads + num_ctas, LISTED)
        offsets, parts = np.zeros(num_ctas + 1, np.int32), np.full((rows, heads, 3), -1, np.int32)
        numbers = numbers_of(batch, costs, num_ctas)
        arrays = (lens, batch.groups.group_of_row, batch.groups.prefix_pages, numbers, tasks)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*arrays, offsets, parts)]
        ranges = function(*pointers[:5], len(tasks), *pointers[5:])
        assert offsets[ranges] <= len(tasks)
        return tasks[: offsets[ranges]], offsets[: ranges + 1], parts

    return call


@pytest.fixture(scope="session")
def list_by_warps(tmp_path_factory):
    """The same by cuda_src/plan_spans.cu, a warp a range."""
    built = tmp_path_factory.mktemp("warps") / "span_warp_harness.so"
    function = build(SUPPORT / "span_warp_harness.cpp", built, *STRICT, "-Wno-unknown-pragmas", "-Wno-unused-function",
                     f"-I{SUPPORT}").list_spans  # fmt: skip
    function.restype = ctypes.c_char_p

    def call(batch, costs, num_ctas):
        lens, rows, heads = np.array(batch.lens, np.int32), len(batch.lens), batch.shape.num_kv_heads
        most = 2 * rows * heads + 2
        tasks, counts = np.zeros((num_ctas, most), LISTED), np.zeros(num_ctas, np.int32)
        parts = np.full((rows, heads, 3), -1, np.int32)
        numbers = np.append(numbers_of(batch, costs, num_ctas), most).astype(np.int32)
        arrays = (lens, batch.groups.group_of_row, batch.groups.prefix_pages, tasks, counts, parts)
        pointers = (ctypes.c_void_p * 6)(*(array.ctypes.data for array in arrays))
        complaint = function(pointers, ctypes.c_void_p(numbers.ctypes.data))
        assert complaint is None, complaint
        assert (counts <= most).all()
        ranges = max(1, np.count_nonzero(counts))  # none of them is empty, and all others are
        offsets = np.concatenate(([0], np.cumsum(counts[:ranges])))
        return np.concatenate([row[:count] for row, count in zip(tasks, counts)]), offsets, parts

    return call


@settings(max_examples=60, deadline=None)
@given(shared_batches(max_rows=40, max_pages=40), balanced_costs, st.integers(1, 150))
@example(case([2048] * 8, [-1] * 8, []), MEASURED_COSTS, 132)  # plain: whole heads for half the CTAs
@example(case([8192, 0], [0, 0], [20]), MEASURED_COSTS, 132)  # nobody to read with: heads cut alike
@example(case([0, 0], [0, 0], [20]), MEASURED_COSTS, 132)
@example(case([8704] * 64, [0] * 64, [512]), MEASURED_COSTS, 132)
@example(case([2304] * 256, [0] * 256, [128]), MEASURED_COSTS, 132)
@example(case([36864] * 8, [0] * 8, [2048]), MEASURED_COSTS, 132)
@example(case([5120] * 64, [row // 16 for row in range(64)], [256] * 4), MEASURED_COSTS, 28)
@example(case([131072] * 64, [0] * 64, [8192]), BalancedCosts(12, 1, 0, 0), 300)
@example(case([4096, 4096, 0, 131072], [1, 1, 1, -1], [9, 256]), MEASURED_COSTS, 132)  # rests of no tiles
@example(case([2**30] * 3, [0] * 3, [2**26], DecodeShape(1, 1, 64, 16), SharedCosts(3, 256)), BalancedCosts(), 300)
@example(case([64, 64], [0, 0], [2**31 - 1]), BalancedCosts(), 4)  # a prefix that no row can have
# What members have for themselves costs the root of a merge and of their reads, up to the greatest there is.
@example(case([15168] * 24, [row // 3 for row in range(24)], [944] * 8, LLAMA, OUTPUTS), MEASURED_COSTS, 132)
@example(case([13376, 9000, 13376], [0, -1, 0], [835], LLAMA, OUTPUTS), MEASURED_COSTS, 132)
@example(case([2**30] * 3, [0] * 3, [2**26], DecodeShape(1, 1, 64, 16), SharedCosts(3, 64, 8, 3, 256)),
         BalancedCosts(), 300)
def test_header_lists_the_tasks_of_pkvsim(list_spans, batch, costs, num_ctas):
    assert_listed(list_spans(batch, costs, num_ctas), batch, costs, num_ctas)


@settings(max_examples=10, deadline=None)
@given(shared_batches(max_rows=40, max_pages=20), balanced_costs, st.integers(1, 12))
@example(case([600 + row for row in range(70)], [row % 35 for row in range(70)], [32] * 40), MEASURED_COSTS, 9)
def test_warps_list_the_tasks_of_pkvsim(list_by_warps, batch, costs, num_ctas):
    assert_listed(list_by_warps(batch, costs, num_ctas), batch, costs, num_ctas)


def assert_listed(listed, batch, costs, num_ctas):
    schedule = make_schedule("balanced", batch.shape, batch.lens, num_ctas=num_ctas, costs=costs, **batch.options())
    tasks, offsets, parts = listed
    np.testing.assert_array_equal(offsets, schedule.cta_offsets)
    np.testing.assert_array_equal(tasks, expected_listing(schedule, batch.groups))
    shared = schedule.shared
    if shared is None:
        assert (parts == -1).all()
        return
    ranges = np.repeat(np.arange(schedule.num_ctas), np.diff(offsets))
    for row, read in enumerate(shared.read_of_row.tolist()):
        for head in range(batch.shape.num_kv_heads):
            if read < 0:
                assert (parts[row, head] == -1).all()
                continue
            holds = ranges[(shared.read_of_task == read) & (schedule.tasks["kv_head"] == head)]
            column = shared.members_of(read).tolist().index(row) * batch.columns
            assert parts[row, head].tolist() == [holds[0], holds[-1], column]


@pytest.mark.parametrize("capability", slow_unless(lambda capability: capability == 90, (86, 90)))
def test_the_listing_kernel_fits(capability):
    used = nvrtc.kernel_resources(SOURCE_DIR / "plan_spans.cu", capability, compile_options({}))["pkv_list_spans"]
    assert used.spills == used.stack == 0
