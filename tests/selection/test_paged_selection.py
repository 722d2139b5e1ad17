"""PagedSelection's decision to select or to go dense, and whether its summaries are right when it selects again."""
from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
from fake_gpu import fake_gpu
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from pkvsim import DecodeShape  # noqa: E402
from pkvsim.devices.device import get_device  # noqa: E402
from pkvsim.policy.selecting import selection_prices  # noqa: E402
from pkvsim.selection.rules import Budget  # noqa: E402
from pkvsim.selection.setup import SelectionSetup  # noqa: E402

SHAPE = DecodeShape(32, 8, 128, 16)
H200 = get_device("h200")
NAME = "gpu.selection.paged_selection"


class Summaries:
    """What has been summarised: tokens of each row."""

    def __init__(self, shape, k_pages, dtype, *, kind, summary_dtype=None) -> None:
        self.shape, self.dtype, self.right_to, self.summary_dtype = shape, dtype, 0, summary_dtype

    def update(self, k_pages, seq_lens, block_table, *, new_tokens=None) -> None:
        length = int(seq_lens[0])
        if new_tokens is None or length - new_tokens <= self.right_to:
            self.right_to = length


@pytest.fixture
def paged(monkeypatch):
    """(module, capturing), whose first element says whether a graph is being captured."""
    capturing = [False]
    with fake_gpu():
        sys.modules.pop(NAME, None)
        module = importlib.import_module(NAME)
        monkeypatch.setattr(module, "PageSummaries", Summaries)
        monkeypatch.setattr(module.arrays, "current_stream", lambda library, device: 0)
        monkeypatch.setattr(module.arrays, "is_capturing", lambda stream: capturing[0])
        yield module, capturing
    sys.modules.pop(NAME, None)


def keep(selection, length, new_tokens, room, *, rows=1, bounds=True) -> bool:
    pages = torch.zeros(2, 8, 16, 128, dtype=torch.float16)
    table = torch.zeros(rows, room // 16, dtype=torch.int32)
    lens = torch.full((rows,), length, dtype=torch.int32)
    known = np.full(rows, length) if bounds else None
    return selection.keep(0, 32, pages, lens, table, new_tokens, bounds=known)


def test_short_steps_go_dense_and_long_ones_select(paged) -> None:
    module, _ = paged
    selection = module.PagedSelection(device=H200)
    assert not keep(selection, 4096, 4096, 131_072) and not keep(selection, 4097, 1, 131_072)
    assert not selection._summaries  # nothing was kept, nor is memory taken
    assert keep(selection, 32_768, 32_768 - 4097, 131_072, rows=64)
    assert selection._summaries[0].right_to == 32_768
    always = module.PagedSelection()
    assert keep(always, 17, 17, 64) and always._summaries[0].right_to == 17


def test_summaries_in_8_bits_are_kept_and_priced_as_such(paged) -> None:
    module, _ = paged
    for summary_dtype in (None, "uint8"):
        selection = module.PagedSelection(device=H200, summary_dtype=summary_dtype)
        setup = SelectionSetup(summary_dtype=summary_dtype)
        assert selection.rule.setup == setup
        least = -(-selection_prices(SHAPE, H200, setup).least_tokens(8) // 64) * 64
        assert not keep(selection, least - 64, 1, 131_072, rows=8) and keep(selection, least, 1, 131_072, rows=8)
        assert selection._summaries[0].summary_dtype == summary_dtype


def test_without_lengths_the_room_of_the_table_decides(paged) -> None:
    module, capturing = paged
    selection = module.PagedSelection(device=H200)
    assert not keep(selection, 100, 1, 4096, bounds=False)
    assert keep(selection, 100, 1, 131_072, bounds=False)
    selection.reset()
    # A graph has one shape: it selects for rows that are short yet, and so do all steps after its capture.
    capturing[0] = True
    assert keep(selection, 100, 1, 131_072)
    capturing[0] = False
    assert keep(selection, 101, 1, 131_072) and not keep(module.PagedSelection(device=H200), 101, 1, 131_072)
    capturing[0] = True
    assert not keep(module.PagedSelection(device=H200), 100, 1, 4096)


@given(st.lists(st.tuples(st.integers(1, 30_000), st.booleans()), min_size=1, max_size=12))
@settings(deadline=None, max_examples=40)
def test_summaries_are_right_in_every_step_that_selects(steps) -> None:
    """Rows grow and are emptied; steps that go dense leave summaries behind, which the next to select makes good."""
    with fake_gpu():
        sys.modules.pop(NAME, None)
        module = importlib.import_module(NAME)
        module.PageSummaries = Summaries
        streams = module.arrays.current_stream, module.arrays.is_capturing
        module.arrays.current_stream, module.arrays.is_capturing = (lambda *_: 0), (lambda *_: False)
        try:
            selection, length = module.PagedSelection(device=H200), 0
            for tokens, resets in steps:
                if resets:
                    selection.reset()
                    length = 0
                length += tokens
                prices = selection_prices(SHAPE, H200, SelectionSetup(budget=Budget()))
                rounded = -(-length // 64) * 64
                assert keep(selection, length, tokens, 1 << 19) == prices.of([rounded]).pays
                if selection._summaries and 0 not in selection._behind:
                    assert selection._summaries[0].right_to == length
        finally:
            module.arrays.current_stream, module.arrays.is_capturing = streams
    sys.modules.pop(NAME, None)
