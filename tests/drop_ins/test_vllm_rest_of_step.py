"""vLLM's step without the rows that decode: every field of each release goes with the rows that are left."""
from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from fake_vllm import FakeVllm, fake_vllm
from hypothesis import given
from hypothesis import strategies as st
from vllm_behaviours import BASE

from gpu.drop_ins.vllm.step import without_first

ROWS = ("seq_lens", "block_table_tensor", "is_prefilling", "seq_lens_cpu_upper_bound", "encoder_seq_lens",
        "encoder_seq_lens_cpu", "dcp_local_seq_lens")
LATER = ("_num_computed_tokens_cache", "logits_indices_padded", "num_logits_indices")
BY_ROW = {  # read out of each release's own code
    "0.24": (*ROWS, "dcp_local_seq_lens_cpu", "_seq_lens_cpu", "_num_computed_tokens_cpu"),
    "0.33": (*ROWS, "req_idx", "dcp_local_seq_lens_cpu_upper_bound", "rswa_prefix_lens", "replayssm_decode_base_cpu"),
}
MADE_LATER = {"0.24": LATER, "0.33": (*LATER, "_token_to_req_indices_cache", "max_logits_per_req")}
BY_TOKEN = ("positions", "slot_mapping")
# Bounds, and what does not go by rows where rows decode.
KEPT = ("max_query_len", "max_seq_len", "causal")
TOLD = ("query_start_loc", "query_start_loc_cpu", "num_reqs", "num_actual_tokens", "mm_req_doc_ranges")


def marked_step(vllm: FakeVllm, lens: list[int]) -> object:
    """A step of rows with so many tokens, with something of its own in every field, NumPy's arrays among them."""
    rows, tokens = np.arange(len(lens)), sum(lens)
    given = {name: torch.tensor(rows + at * 100) for at, name in enumerate(BY_ROW[vllm.band])}
    given |= {name: torch.arange(tokens) + at * 100 for at, name in enumerate(BY_TOKEN)}
    given |= {name: given[name].numpy() for name in ("req_idx", "encoder_seq_lens_cpu") if name in given}
    starts = torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32)
    return vllm.named(BASE, "CommonAttentionMetadata")(
        query_start_loc=starts, query_start_loc_cpu=starts.clone(), num_reqs=len(lens), num_actual_tokens=tokens,
        max_query_len=max(lens), max_seq_len=99, causal=True, mm_req_doc_ranges={int(row): [(row, 2)] for row in rows},
        **given, **dict.fromkeys(MADE_LATER[vllm.band], 3))


@given(st.sampled_from(sorted(BY_ROW)), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_the_other_rows_keep_their_own_fields(band, lens, data) -> None:
    first = data.draw(st.integers(0, len(lens) - 1))
    tokens = sum(lens[:first])
    with fake_vllm(band) as vllm:
        whole = marked_step(vllm, lens)
        assert {one.name for one in dataclasses.fields(whole)} == {
            *BY_ROW[band], *BY_TOKEN, *MADE_LATER[band], *KEPT, *TOLD}
        rest = without_first(whole, first, tokens, vllm.adapter.FlashBuilder.step_fields)
    starts = [0, *np.cumsum(lens[first:])]
    assert rest.query_start_loc.tolist() == rest.query_start_loc_cpu.tolist() == starts
    assert (rest.num_reqs, rest.num_actual_tokens) == (len(lens) - first, sum(lens) - tokens)
    assert rest.mm_req_doc_ranges == {row - first: [(row, 2)] for row in range(first, len(lens))}
    for names, begin in ((BY_ROW[band], first), (BY_TOKEN, tokens)):
        for name in names:
            assert getattr(rest, name).tolist() == getattr(whole, name)[begin:].tolist(), name
    assert all(getattr(rest, name) is None for name in MADE_LATER[band])
    assert all(getattr(rest, name) == getattr(whole, name) for name in KEPT)


@pytest.mark.parametrize("band", BY_ROW)
def test_what_a_step_does_not_have_it_does_not_get(band) -> None:
    with fake_vllm(band) as vllm:
        whole = marked_step(vllm, [1, 2, 3])
        for name in ("is_prefilling", "encoder_seq_lens", "dcp_local_seq_lens", "positions", "mm_req_doc_ranges"):
            setattr(whole, name, None)
        rest = without_first(whole, 1, 1, vllm.adapter.FlashBuilder.step_fields)
    for name in ("is_prefilling", "encoder_seq_lens", "dcp_local_seq_lens", "positions", "mm_req_doc_ranges"):
        assert getattr(rest, name) is None
