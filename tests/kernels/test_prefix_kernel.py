"""The GPU finds the groups that pkvsim finds: cuda_src/prefixes.cu, run on the CPU and compiled for GPUs."""
import ctypes

import numpy as np
import nvrtc
import pytest
from cpp import STRICT, build
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SUPPORT
from prefix_cases import tables
from slow import slow_unless

from gpu.inputs.block_tables import TableLayout
from gpu.kernels.compile import SOURCE_DIR, compile_options
from pkvsim.schedule.prefixes import SharingRule, find_prefixes

WARPS = 2  # of the CTAs that run here: 64 rows a pass
PAGE_SIZE = 3
QUIET = ("-Wno-unused-function", "-Wno-unknown-pragmas", "-Wno-unused-parameter")
LAYOUTS = (TableLayout(int64=False, csr=False, last_page=False), TableLayout(int64=True, csr=True, last_page=True))


@pytest.fixture(scope="module")
def run_kernel(tmp_path_factory):
    """(layout, table [rows, max_pages], lens, query_tokens, rule, workspace of earlier launches) -> (group_of_row,
    prefix_pages)."""
    folder, functions = tmp_path_factory.mktemp("prefixes"), {}
    options = [option for option in STRICT if option != "-O2"]
    for layout in LAYOUTS:
        defines = layout.defines() | {"PAGE_SIZE": PAGE_SIZE, "WARPS": WARPS}
        built = build(SUPPORT / "prefix_harness.cpp", folder / f"{layout.csr}.so", *options, "-O1", *QUIET,
                      f"-I{SUPPORT}", *(f"-D{name}={value}" for name, value in defines.items()))  # fmt: skip
        functions[layout] = built.find_prefixes
        functions[layout].restype = ctypes.c_char_p

    def call(layout, table, lens, query_tokens, rule, workspace=None):
        rows, stride = table.shape
        lens = np.asarray(lens, np.int32)
        begins, lengths = np.zeros(1, np.int32), lens
        if layout.csr:
            pages = -(-lens // PAGE_SIZE)
            begins = np.concatenate(([0], np.cumsum(pages))).astype(np.int32)
            table = np.concatenate([row[:count] for row, count in zip(table, pages)] + [[0]]).astype(np.int64)
            stride, lengths = len(table), (lens - (pages - 1) * PAGE_SIZE).astype(np.int32)
        groups, prefixes = np.full(rows, -5, np.int32), np.full(max(1, rows // 2), -5, np.int32)
        workspace = np.zeros((2, rows), np.uint64) if workspace is None else workspace
        arrays = (np.ascontiguousarray(table), begins, lengths, groups, prefixes, workspace)
        pointers = (ctypes.c_void_p * 6)(*(array.ctypes.data for array in arrays))
        numbers = np.array([stride, 1, rows, 2**31 - 1, query_tokens, *rule], np.int32)
        complaint = functions[layout](pointers, ctypes.c_void_p(numbers.ctypes.data))
        assert complaint is None, complaint
        assert not workspace[0].any()
        return groups, prefixes

    return call


def assert_equal(found, wanted):
    groups, prefixes = found
    assert groups.tolist() == wanted.group_of_row.tolist()
    count = len(wanted.prefix_pages)
    assert prefixes[:count].tolist() == wanted.prefix_pages.tolist() and not prefixes[count:].any()


@settings(max_examples=60, deadline=None)
@given(tables(), st.sampled_from(LAYOUTS), st.sampled_from([1, 3]),
       st.builds(SharingRule, st.integers(0, 9), st.integers(0, 30)))  # fmt: skip
def test_groups_are_those_of_pkvsim(run_kernel, case, layout, query_tokens, rule):
    table, pages, extra = case
    lens = pages * PAGE_SIZE + np.minimum(extra, PAGE_SIZE - 1)
    table = np.pad(table, ((0, 0), (0, 1)), constant_values=7)
    found = run_kernel(layout, table, lens, query_tokens, rule)
    assert_equal(found, find_prefixes(table, lens, page_size=PAGE_SIZE, query_tokens=query_tokens, rule=rule))


@settings(max_examples=60, deadline=None)
@given(st.data(), tables(), st.sampled_from(LAYOUTS))
def test_links_of_other_tables_are_kept(run_kernel, data, case, layout):
    """Rows that are the same, longer, shorter, in another order, or of another launch altogether, half of it written."""
    table, pages, extra = case
    rows, rule = len(table), data.draw(st.builds(SharingRule, st.integers(0, 9), st.integers(0, 30)))
    table = np.pad(table, ((0, 0), (0, 1)), constant_values=7)
    lens = pages * PAGE_SIZE + np.minimum(extra, PAGE_SIZE - 1)
    workspace = np.zeros((2, rows), np.uint64)
    for _ in range(3):
        found = run_kernel(layout, table, lens, 1, rule, workspace)
        assert_equal(found, find_prefixes(table, lens, page_size=PAGE_SIZE, rule=rule))
        change = data.draw(st.sampled_from(["none", "order", "lengths", "torn"]))
        if change == "order":
            order = np.array(data.draw(st.permutations(range(rows))))
            table, lens = table[order], lens[order]
        elif change == "lengths":
            most = np.full(rows, (table.shape[1] - 1) * PAGE_SIZE)
            lens = np.minimum(most, np.array(data.draw(st.lists(st.integers(0, int(most[0])), min_size=rows,
                                                                max_size=rows))))  # fmt: skip
        elif change == "torn":
            workspace[1, data.draw(st.lists(st.integers(0, rows - 1)))] = 0


def test_more_rows_and_pages_than_threads(run_kernel):
    """Documents under a system prompt, rows in any order; ids that meet at a probe alone; rows that share nothing."""
    rng = np.random.default_rng(5)
    table = rng.integers(10**6, 10**8, (70, 200), dtype=np.int32)
    table[:60, :20] = table[0, :20]
    for document in range(3):
        rows = np.arange(document, 54, 3)
        table[rows, : 140 + document] = table[rows[0], : 140 + document]
    table[60:65, [0, 1, 16, 128]] = table[0, [0, 1, 16, 128]]
    table = table[rng.permutation(70)]
    lens = np.full(70, 200 * PAGE_SIZE)
    for rule, groups in ((SharingRule(0, 0), 4), (SharingRule(20, 0), 3), (SharingRule(0, 10**6), 0)):
        wanted = find_prefixes(table, lens, page_size=PAGE_SIZE, rule=rule)
        assert len(wanted.prefix_pages) == groups
        assert_equal(run_kernel(LAYOUTS[0], table, lens, 1, rule), wanted)


@pytest.mark.parametrize("capability", slow_unless(lambda capability: capability == 90, (86, 90)))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_fits(capability, layout):
    defines = layout.defines() | {"PAGE_SIZE": 16, "WARPS": 16}
    used = nvrtc.kernel_resources(SOURCE_DIR / "prefixes.cu", capability, compile_options(defines))["pkv_find_prefixes"]
    assert used.registers <= 64 and used.spills == used.stack == 0  # two CTAs of 16 warps an SM
