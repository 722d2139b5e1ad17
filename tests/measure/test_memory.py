"""How much memory scripts plan with, and that pools of any size are aligned."""
from __future__ import annotations

import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu.measure import memory
from gpu.measure.pools import HALF_ELEMENTS, pool_elements
from pkvsim import DecodeShape

GIB = 2**30


@pytest.fixture
def free(monkeypatch):
    """Says how many GiB are free."""
    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(empty_cache=lambda: None)
    monkeypatch.setitem(sys.modules, "torch", torch)

    def set_free(gib: float) -> None:
        torch.cuda.mem_get_info = lambda: (int(gib * GIB), 140 * GIB)

    return set_free


def test_a_default_fits_and_says_when_it_is_less(free) -> None:
    free(130)
    whole = memory.budget(40.0)
    assert (whole.granted_gib, whole.shrunk, str(whole)) == (40.0, False, "pool 40 GiB")
    free(11.5)
    small = memory.budget(40.0)
    assert small.granted_gib == pytest.approx(11.5 * 2 / 3) and small.shrunk
    assert str(small) == "pool 7.67 GiB in place of 40: 11.5 GiB of the GPU are free"
    assert memory.budget(24.0, beside=1.5).granted_gib == pytest.approx(11.5 * 2 / 4.5)
    assert memory.budget(2.0).granted_gib == 2.0


def test_what_is_asked_for_is_given_or_refused(free) -> None:
    free(11.5)
    assert memory.budget(40.0, 10.0).granted_gib == 10.0
    with pytest.raises(ValueError, match="^pool-gib: expected at most 11.5, of which GPU memory has room, got 12$"):
        memory.budget(40.0, 12.0)
    with pytest.raises(ValueError, match="^pool-gib: expected at most 7.67"):
        memory.budget(24.0, 8.0, beside=1.5)


@given(gib=st.floats(0.01, 200), wanted=st.integers(1, 500), bytes_each=st.integers(1, 2**33))
def test_as_many_as_fit(gib, wanted, bytes_each) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_bytes", lambda: int(gib * GIB))
        count = memory.fitting(wanted, bytes_each=bytes_each)
    assert 1 <= count <= wanted
    assert count == 1 or count * bytes_each <= gib * GIB * memory.POOL_SHARE
    assert count == wanted or (count + 1) * bytes_each > int(int(gib * GIB) * memory.POOL_SHARE)


@given(gib=st.floats(0, 150), element_bytes=st.sampled_from([1, 2]))
def test_both_halves_start_on_a_boundary(gib, element_bytes) -> None:
    """Of the pool and of its 8-bit copy, whose size is no larger than asked."""
    elements = pool_elements(gib)
    assert elements * 2 <= gib * GIB and elements * 2 > gib * GIB - 4 * HALF_ELEMENTS
    assert elements // 2 * element_bytes % 256 == 0 and elements % 2 == 0


@pytest.mark.parametrize("gib", [0.0123, 0.05])
def test_pages_of_a_pool_of_any_size_are_aligned(gib) -> None:
    torch = pytest.importorskip("torch")
    from gpu.measure.pools import BenchPool

    pool = BenchPool.__new__(BenchPool)
    pool.flat = torch.zeros(pool_elements(gib), dtype=torch.float16)
    for shape in (DecodeShape(32, 8, 128, 16), DecodeShape(28, 4, 128, 3), DecodeShape(8, 2, 64, 1)):
        for pages in pool.pages(shape):
            assert pages.storage_offset() * 2 % 256 == 0 and len(pages) > 0
