"""One vLLM step cut into rows that decode and rows that prefill. Needs no vLLM.

vLLM puts rows of few query tokens first. The first rows that all have as many of them decode, in one launch, which
reads their lengths and their part of the block table where vLLM keeps them; the base backend gets the rest as a step of
its own.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pkvsim.options import MAX_QUERY_TOKENS


@dataclass(slots=True, eq=False)
class DecodeRows:
    """The rows of one step that decode, all with as many query tokens. Engines plan them once: they go by identity."""

    seq_lens: torch.Tensor  # [num_rows] int32 on the GPU, the step's own tokens included
    block_table: torch.Tensor  # [num_rows, max_blocks] int32 on the GPU
    num_rows: int
    query_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.query_tokens


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a step is cut: `rows` first rows of `query_tokens` each decode; `rest` says whether any token is left."""

    rows: int
    query_tokens: int
    rest: bool


def served_query_tokens(num_drafts: int) -> tuple[int, ...]:
    """Query tokens that a row which decodes may have, ascending: one, and those that verify all drafts."""
    verified = 1 + num_drafts
    return (1, verified) if 1 < verified <= MAX_QUERY_TOKENS else (1,)


def cut_step(query_start_loc: torch.Tensor, num_tokens: int, served: tuple[int, ...], most_rows: int) -> Cut:
    """Where the step of these rows is cut.

    query_start_loc: [batch_size + 1] int32 on the host. num_tokens: of the step; in a CUDA graph rows that have none
    pad it, and come last. They decode too, over their length of 0, as far as the step has tokens for them. served:
    query tokens of a row that can decode. most_rows: that may decode.
    """
    lens = np.diff(query_start_loc.numpy())
    if not len(lens) or lens[0] not in served:
        return Cut(0, 1, bool(lens.any()))
    tokens = int(lens[0])
    alike = lens == tokens
    rows = min(len(lens) if alike.all() else int(alike.argmin()), most_rows)
    if lens[rows:].any():
        return Cut(rows, tokens, True)
    return Cut(min(len(lens), most_rows, num_tokens // tokens), tokens, False)


@dataclass(frozen=True, slots=True)
class StepFields:
    """Names of fields of vLLM's CommonAttentionMetadata that its releases do not have in common, by what they hold."""

    by_row: tuple[str, ...]  # one entry a row, or None
    made_later: tuple[str, ...]  # what vLLM fills in from the step's other fields where it is None


# Those of all releases that there is an adapter for.
BY_ROW = ("is_prefilling", "seq_lens_cpu_upper_bound", "encoder_seq_lens", "encoder_seq_lens_cpu",
          "dcp_local_seq_lens")
MADE_LATER = ("_num_computed_tokens_cache", "logits_indices_padded", "num_logits_indices")
FIELDS = StepFields(
    by_row=(*BY_ROW, "dcp_local_seq_lens_cpu", "_seq_lens_cpu", "_num_computed_tokens_cpu"), made_later=MADE_LATER)


def without_first(common: Any, rows: int, tokens: int, fields: StepFields = FIELDS) -> Any:
    """vLLM's CommonAttentionMetadata of the step without its first rows, which have so many tokens together."""
    ranges = common.mm_req_doc_ranges
    by_row = {name: getattr(common, name) for name in fields.by_row}
    return common.replace(
        query_start_loc=common.query_start_loc[rows:] - tokens,
        query_start_loc_cpu=common.query_start_loc_cpu[rows:] - tokens,
        seq_lens=common.seq_lens[rows:],
        num_reqs=common.num_reqs - rows,
        num_actual_tokens=common.num_actual_tokens - tokens,
        block_table_tensor=common.block_table_tensor[rows:],
        slot_mapping=common.slot_mapping[tokens:],
        positions=None if common.positions is None else common.positions[tokens:],
        mm_req_doc_ranges=None if ranges is None else {row - rows: r for row, r in ranges.items() if row >= rows},
        **{name: None if array is None else array[rows:] for name, array in by_row.items()},
        **dict.fromkeys(fields.made_later),
    )
