"""Page tables there and back, against plain Python; on the CPU, by the same torch calls as on a GPU."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")

from gpu import page_tables

PAGE_SIZES = st.sampled_from([1, 2, 16, 64])
LENS = st.lists(st.integers(0, 200), min_size=1, max_size=9)


def csr(lens: list[int], page_size: int, seed: int = 0) -> tuple:
    """(pages of each row, indptr, indices, last_page_len) of rows that own random pages."""
    pages = [-(-length // page_size) for length in lens]
    ids = np.random.default_rng(seed).permutation(sum(pages) + 3).astype(np.int32)
    ends = np.cumsum([0, *pages]).astype(np.int32)
    rows = [ids[a:b].tolist() for a, b in zip(ends, ends[1:])]
    last = np.array([(length - 1) % page_size + 1 if length else 0 for length in lens], np.int32)
    return rows, torch.from_numpy(ends), torch.from_numpy(ids[:ends[-1]].copy()), torch.from_numpy(last)


@settings(deadline=None, max_examples=150)
@given(lens=LENS, page_size=PAGE_SIZES, spare_width=st.integers(0, 3), spare_indices=st.integers(0, 4))
def test_csr_becomes_a_block_table(lens, page_size, spare_width, spare_indices) -> None:
    rows, indptr, indices, last = csr(lens, page_size)
    indices = torch.cat([indices, torch.full((spare_indices,), 12345, dtype=torch.int32)])  # a longer buffer
    width = max(map(len, rows)) + spare_width
    out = torch.full((len(lens), width), -7, dtype=torch.int32)
    assert page_tables.block_table_of(indptr, indices, out=out) is out
    assert [row[:len(pages)] for row, pages in zip(out.tolist(), rows)] == rows
    assert all(entry == -7 for row, pages in zip(out.tolist(), rows) for entry in row[len(pages):])
    assert page_tables.seq_lens_of(indptr, last, page_size).tolist() == lens


@settings(deadline=None, max_examples=150)
@given(lens=LENS, page_size=PAGE_SIZES, spare_indices=st.none() | st.integers(0, 4))
def test_there_and_back(lens, page_size, spare_indices) -> None:
    _, indptr, indices, last = csr(lens, page_size, seed=1)
    width = page_tables.table_width(indptr, len(indices))
    table = torch.full((len(lens), width), 0x7FFFFFFF, dtype=torch.int32)
    page_tables.block_table_of(indptr, indices, out=table)
    seq_lens = page_tables.seq_lens_of(indptr, last, page_size)
    length = None if spare_indices is None else len(indices) + spare_indices
    back = page_tables.csr_of(seq_lens, table, page_size, num_indices=length)
    assert back[0].tolist() == indptr.tolist() and back[2].tolist() == last.tolist()
    assert back[1].tolist() == indices.tolist() + [0] * (spare_indices or 0)


@settings(deadline=None, max_examples=100)
@given(steps=st.lists(LENS, min_size=1, max_size=4), page_size=PAGE_SIZES)
def test_tables_of_step_after_step(steps, page_size) -> None:
    tables = page_tables.StepTables()
    for seed, lens in enumerate(steps):
        rows, indptr, indices, last = csr(lens, page_size, seed)
        tables.update(indptr, indices, last, page_size, device=torch.device("cpu"))
        assert tables.seq_lens.tolist() == lens
        assert [row[:len(pages)] for row, pages in zip(tables.block_table.tolist(), rows)] == rows
        widest = max(map(len, rows))
        assert widest <= tables.block_table.shape[1] < max(2, 2 * widest)


def fixed_buffers(batch_size: int, num_indices: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(size, dtype=torch.int32) for size in (batch_size + 1, num_indices, batch_size))


@settings(deadline=None, max_examples=100)
@given(steps=st.lists(st.lists(st.integers(0, 200), min_size=3, max_size=3), min_size=1, max_size=4),
       bounded=st.booleans())
def test_fixed_tables_are_the_same_tensors_at_every_step(steps, bounded) -> None:
    tables, addresses = page_tables.StepTables(fixed_buffers(3, 40)), set()
    for seed, lens in enumerate(steps):
        rows, indptr, indices, last = csr(lens, 16, seed)
        tables.update(indptr, indices, last, 16, device=torch.device("cpu"), max_pages=13 if bounded else None)
        addresses.add((tables.block_table.data_ptr(), tables.seq_lens.data_ptr()))
        assert tables.seq_lens.tolist() == lens
        assert [row[:len(pages)] for row, pages in zip(tables.block_table.tolist(), rows)] == rows
    assert len(addresses) == 1


def test_fixed_tables_refuse_what_does_not_fit() -> None:
    tables, cpu = page_tables.StepTables(fixed_buffers(2, 6)), torch.device("cpu")
    _, *arrays = csr([20, 30], 16)
    tables.update(*arrays, 16, device=cpu, max_pages=2)
    for lens, name in (([1], "last_page_len"), ([60, 60], "indices"), ([40, 5], "block_tables")):
        _, *arrays = csr(lens, 16)
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            tables.update(*arrays, 16, device=cpu)
    assert tables.seq_lens.tolist() == [20, 30]


def test_pages_beyond_the_table_are_left_out() -> None:
    _, indptr, indices, _ = csr([50, 200, 10], 10)
    out = torch.full((3, 6), -7, dtype=torch.int32)
    page_tables.block_table_of(indptr, indices, out=out)
    assert out[1].tolist() == indices[5:11].tolist() and out[2].tolist() == [int(indices[25]), *[-7] * 5]


def test_empty_rows_have_no_tokens_whatever_their_last_page() -> None:
    indptr, last = torch.tensor([0, 0, 1], dtype=torch.int32), torch.tensor([16, 5], dtype=torch.int32)
    out = torch.empty(2, dtype=torch.int32)
    assert page_tables.seq_lens_of(indptr, last, 16, out=out) is out
    assert out.tolist() == [0, 5]


@pytest.mark.parametrize("change", [
    {"indptr": torch.zeros(3, dtype=torch.int64)}, {"indptr": torch.zeros(5, dtype=torch.int32)},
    {"indices": torch.zeros((2, 2), dtype=torch.int32)}, {"indices": torch.zeros(2)},
    {"out": torch.zeros((2, 4), dtype=torch.int64)}, {"out": torch.zeros((4, 2), dtype=torch.int32).T},
    {"last_page_len": torch.zeros(2, dtype=torch.int64)},
])
def test_wrong_arrays_are_named(change) -> None:
    sizes = {"indptr": 3, "indices": 2, "out": (2, 4), "last_page_len": 2}
    given = {name: torch.zeros(size, dtype=torch.int32) for name, size in sizes.items()} | change
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: expected"):
        page_tables.seq_lens_of(given["indptr"], given["last_page_len"], 16)
        page_tables.block_table_of(given["indptr"], given["indices"], out=given["out"])
