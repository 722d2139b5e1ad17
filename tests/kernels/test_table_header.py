"""Where kernels look for page ids and lengths: cuda_src/table.cuh and plan.cuh, built for the CPU, against NumPy."""
from __future__ import annotations

import ctypes

import numpy as np
import pytest
from cpp import STRICT, build
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SUPPORT

from gpu.inputs.block_tables import TableLayout

HARNESS = SUPPORT / "table_harness.cpp"
LAYOUTS = tuple(TableLayout(int64=wide, csr=csr, last_page=csr) for wide in (False, True) for csr in (False, True))
PAGE_SIZE, MOST, NUM_PAGES = 12, 700, 50
ROWS = st.lists(st.integers(0, 20), min_size=1, max_size=8)  # pages of each
INT32 = st.integers(-(2**31), 2**31 - 1)
POINTER = ctypes.c_void_p


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The harness of each layout."""
    folder, libraries = tmp_path_factory.mktemp("table"), {}
    for index, layout in enumerate(LAYOUTS):
        defines = [f"-D{name}={value}" for name, value in (layout.defines() | {"PAGE_SIZE": PAGE_SIZE}).items()]
        libraries[layout] = build(HARNESS, folder / f"{index}.so", *STRICT, *defines)
    return libraries


def at(array: np.ndarray) -> POINTER:
    return POINTER(array.ctypes.data)


@settings(max_examples=200, deadline=None)
@given(layout=st.sampled_from(LAYOUTS), pages=ROWS, seed=st.integers(0, 999), start=st.integers(0, 5))
def test_ids_are_those_of_the_table_cut_to_the_pool(built, layout, pages, seed, start) -> None:
    rng = np.random.default_rng(seed)
    kind = np.int64 if layout.int64 else np.int32
    limits = np.iinfo(kind)
    wild = [limits.min, -1, NUM_PAGES, limits.max, 2**31 - 1]
    begins = (start + np.cumsum([0, *pages])).astype(np.int32)
    width = max(pages) + 2
    ids = rng.integers(0, NUM_PAGES, begins[-1] if layout.csr else len(pages) * width).astype(kind)
    bad = rng.random(len(ids)) < 0.2
    ids[bad] = rng.choice(wild, bad.sum())
    rows = np.repeat(np.arange(len(pages)), pages).astype(np.int32)
    columns = np.concatenate([np.arange(n) for n in pages] or [[]]).astype(np.int32)
    out = np.empty(len(rows), np.int32)
    stride = len(ids) if layout.csr else width
    built[layout].load_ids(
        at(ids), stride, NUM_PAGES, at(begins), len(pages), at(rows), at(columns), len(rows), at(out)
    )
    raw = ids[begins[rows] + columns if layout.csr else rows * width + columns]
    assert out.tolist() == [int(i) if 0 <= i < NUM_PAGES else NUM_PAGES - 1 for i in raw]


@settings(max_examples=200, deadline=None)
@given(wide=st.booleans(), begins=st.lists(INT32, min_size=2, max_size=5), row=st.integers(0, 2**31 - 1), column=INT32)
def test_csr_is_read_within_its_arrays_whatever_they_hold(built, wide, begins, row, column) -> None:
    """A stale plan may ask for any row: what is read must lie inside, or the sanitizer of a real GPU would stop it."""
    layout = TableLayout(int64=wide, csr=True, last_page=True)
    ids = np.full(7, 3, np.int64 if wide else np.int32)
    begins, rows, columns = (np.array(values, np.int32) for values in (begins, [row], [column]))
    out = np.empty(1, np.int32)
    built[layout].load_ids(at(ids), 7, NUM_PAGES, at(begins), len(begins) - 1, at(rows), at(columns), 1, at(out))
    assert out[0] == 3  # anything else came from beside the array


@settings(max_examples=300, deadline=None)
@given(layout=st.sampled_from(LAYOUTS), pages=ROWS, data=st.data())
def test_lengths_are_pages_and_the_last_ones_tokens(built, layout, pages, data) -> None:
    last = data.draw(st.lists(st.integers(1, PAGE_SIZE), min_size=len(pages), max_size=len(pages)))
    begins = np.cumsum([0, *pages]).astype(np.int32)
    lens = np.array([(n - 1) * PAGE_SIZE + tail if n else 0 for n, tail in zip(pages, last)], np.int32)
    given_lens = np.array(last, np.int32) if layout.last_page else lens
    out = np.empty(len(pages) + 1, np.int32)
    built[layout].lengths(at(given_lens), at(begins), len(pages), MOST, at(out))
    assert out.tolist() == [*lens.tolist(), MOST]


@settings(max_examples=300, deadline=None)
@given(begins=st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=5), data=st.data())
def test_lengths_of_garbage_are_cut(built, begins, data) -> None:
    last = np.array(data.draw(st.lists(INT32, min_size=len(begins) - 1, max_size=len(begins) - 1)), np.int32)
    begins, out = np.array(begins, np.int32), np.empty(len(begins), np.int32)
    built[LAYOUTS[1]].lengths(at(last), at(begins), len(last), MOST, at(out))
    assert ((out >= 0) & (out <= MOST)).all()
