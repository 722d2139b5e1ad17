"""Decode attention in float64: at once, and tile by tile through a schedule as the GPU does it.

Only tokens that a row owns are read, so NaN elsewhere in the pool never reaches an output.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pkvsim.shapes import DecodeShape, StepState, describe

if TYPE_CHECKING:
    from pkvsim.schedule import Schedule


def attention(
    shape: DecodeShape,
    q: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    block_table: np.ndarray,
    seq_lens: np.ndarray,
    *,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """softmax(scale * q k^T) v per row, in float64.

    q [batch_size, num_q_heads, head_dim]; k_pages, v_pages [num_pages, num_kv_heads, page_size,
    head_dim], any float dtype; block_table [batch_size, max_pages], seq_lens [batch_size] integers.
    scale: 1 / sqrt(head_dim) by default.
    Returns out float64 [batch_size, num_q_heads, head_dim] and lse float64 [batch_size, num_q_heads],
    natural log. A zero-length row gives zeros and -inf. Raises ValueError naming the argument.
    """
    step, scale = _check(shape, q, k_pages, v_pages, block_table, seq_lens, scale)
    out, lse = _empty_outputs(shape, step)
    for row, seq_len in enumerate(step.seq_lens):
        if seq_len == 0:
            continue
        heads = range(shape.num_kv_heads)
        k = np.stack([_tokens(k_pages, step.block_table[row], h, 0, int(seq_len), shape.page_size) for h in heads])
        v = np.stack([_tokens(v_pages, step.block_table[row], h, 0, int(seq_len), shape.page_size) for h in heads])
        scores = _grouped(shape, q[row]) @ k.transpose(0, 2, 1) * scale  # [num_kv_heads, group_size, seq_len]
        top = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        out[row] = (weights @ v / total).reshape(shape.num_q_heads, shape.head_dim)
        lse[row] = (top + np.log(total)).reshape(shape.num_q_heads)
    return out, lse


def run_schedule(
    schedule: Schedule,
    shape: DecodeShape,
    q: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    block_table: np.ndarray,
    seq_lens: np.ndarray,
    *,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The same result by the schedule's tasks: online softmax over tiles, then a merge of the partials.

    Arguments and results as in `attention`; `schedule` must have been made for these seq_lens.
    """
    step, scale = _check(shape, q, k_pages, v_pages, block_table, seq_lens, scale)
    if len(schedule.split_offsets) != step.batch_size + 1:
        raise ValueError(f"schedule: expected one of {step.batch_size} rows, got {len(schedule.split_offsets) - 1}")
    slots = int(schedule.split_offsets[-1])
    group = shape.group_size
    # Slots no task writes stay the empty state, which merges as nothing.
    m = np.full((slots, shape.num_kv_heads, group), -np.inf)
    l = np.zeros((slots, shape.num_kv_heads, group))
    acc = np.zeros((slots, shape.num_kv_heads, group, shape.head_dim))
    for row, kv_head, split, tile_begin, tile_end in schedule.tasks.tolist():
        state = (np.full(group, -np.inf), np.zeros(group), np.zeros((group, shape.head_dim)))
        q_group = _grouped(shape, q[row])[kv_head]
        for tile in range(tile_begin, tile_end):
            begin = tile * schedule.tile_tokens
            end = min(begin + schedule.tile_tokens, int(step.seq_lens[row]))
            k = _tokens(k_pages, step.block_table[row], kv_head, begin, end, shape.page_size)
            v = _tokens(v_pages, step.block_table[row], kv_head, begin, end, shape.page_size)
            state = _add_tile(state, q_group @ k.T * scale, v)
        slot = int(schedule.split_offsets[row]) + split
        m[slot, kv_head], l[slot, kv_head], acc[slot, kv_head] = state
    out, lse = _empty_outputs(shape, step)
    for row in range(step.batch_size):
        begin, end = schedule.split_offsets[row], schedule.split_offsets[row + 1]
        if begin < end:
            row_out, row_lse = merge_states(m[begin:end], l[begin:end], acc[begin:end])
            out[row] = row_out.reshape(shape.num_q_heads, shape.head_dim)
            lse[row] = row_lse.reshape(shape.num_q_heads)
    return out, lse


def merge_states(m: np.ndarray, l: np.ndarray, acc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merges partial softmax states over their first axis, exactly.

    m (maxima) and l (sums of exp(score - m)) [states, ...]; acc (sums of exp(score - m) * v)
    [states, ..., head_dim]. An empty state is m = -inf, l = 0, acc = 0.
    Returns out [..., head_dim] and lse [...], natural log; zeros and -inf where every state is empty.
    """
    top = m.max(axis=0)
    safe = np.where(np.isneginf(top), 0.0, top)  # exp(-inf - 0) is 0, exp(-inf + inf) would be NaN
    weights = np.exp(m - safe)
    total = (weights * l).sum(axis=0)
    out = (weights[..., None] * acc).sum(axis=0) / np.where(total == 0, 1.0, total)[..., None]
    with np.errstate(divide="ignore"):
        return out, safe + np.log(total)


def _add_tile(
    state: tuple[np.ndarray, np.ndarray, np.ndarray], scores: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of online softmax: scores [group_size, tokens], v [tokens, head_dim]."""
    m, l, acc = state
    top = np.maximum(m, scores.max(axis=-1))
    weights = np.exp(scores - top[:, None])
    decay = np.exp(m - top)
    return top, decay * l + weights.sum(axis=-1), decay[:, None] * acc + weights @ v


def _tokens(
    pages: np.ndarray, page_ids: np.ndarray, kv_head: int, begin: int, end: int, page_size: int
) -> np.ndarray:
    """Tokens [begin, end) of a row's KV head as float64 [tokens, head_dim]; loads owned pages only."""
    first, last = begin // page_size, -(-end // page_size)
    loaded = pages[page_ids[first:last], kv_head]  # [pages, page_size, head_dim]
    tokens = loaded.reshape(-1, loaded.shape[-1])[begin - first * page_size : end - first * page_size]
    return tokens.astype(np.float64)


def _grouped(shape: DecodeShape, q_row: np.ndarray) -> np.ndarray:
    return q_row.astype(np.float64).reshape(shape.num_kv_heads, shape.group_size, shape.head_dim)


def _empty_outputs(shape: DecodeShape, step: StepState) -> tuple[np.ndarray, np.ndarray]:
    out = np.zeros((step.batch_size, shape.num_q_heads, shape.head_dim))
    return out, np.full((step.batch_size, shape.num_q_heads), -np.inf)


def _check(
    shape: DecodeShape,
    q: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    block_table: np.ndarray,
    seq_lens: np.ndarray,
    scale: float | None,
) -> tuple[StepState, float]:
    step = StepState(seq_lens, block_table)
    page_shape = (shape.num_kv_heads, shape.page_size, shape.head_dim)
    num_pages = len(k_pages)
    expected = {
        "q": (q, (step.batch_size, shape.num_q_heads, shape.head_dim)),
        "k_pages": (k_pages, (num_pages, *page_shape)),
        "v_pages": (v_pages, (num_pages, *page_shape)),
    }
    for name, (array, want) in expected.items():
        if array.shape != want or array.dtype.kind != "f":
            raise ValueError(f"{name}: expected floats {list(want)}, got {describe(array)}")
    step.check_pages(shape, num_pages=num_pages)
    return step, shape.head_dim**-0.5 if scale is None else float(scale)
