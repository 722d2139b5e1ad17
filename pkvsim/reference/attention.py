"""Decode attention in float64: at once, and tile by tile through a schedule as the GPU does it.

Only tokens that a row owns are read, so NaN elsewhere in the pool never reaches an output.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.shapes import DecodeShape, StepState, describe, is_number

if TYPE_CHECKING:
    from pkvsim.schedule.task_list import Schedule, SharedReads


def attention(
    shape: DecodeShape,
    q: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    block_table: np.ndarray,
    seq_lens: np.ndarray,
    *,
    scale: float | None = None,
    options: AttentionOptions = PLAIN,
    sinks: np.ndarray | None = None,
    query_lens: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """softmax(scale * q k^T) v per row, in float64.

    q [batch_size, num_q_heads, head_dim]; k_pages, v_pages [num_pages, num_kv_heads, page_size,
    head_dim], any float dtype; block_table [batch_size, max_pages], seq_lens [batch_size] integers.
    scale: 1 / sqrt(head_dim) by default. With options.query_tokens = n > 1, q is [batch_size, n, num_q_heads, head_dim]
    and out, lse gain that axis; query_lens [batch_size] says how many of the n a row has, the first ones (others give
    zeros and -inf). sinks [num_q_heads]: natural-log logits, with options.sinks.
    Returns out float64 [batch_size, num_q_heads, head_dim] and lse float64 [batch_size, num_q_heads],
    natural log. A zero-length row gives zeros and -inf. Raises ValueError naming the argument.
    """
    given = _check(shape, q, k_pages, v_pages, block_table, seq_lens, scale, options, sinks, query_lens)
    k_pages, v_pages = np.asarray(k_pages), np.asarray(v_pages)
    out, lse = _empty_outputs(shape, given)
    for row, seq_len in enumerate(given.step.seq_lens):
        if seq_len == 0:
            continue
        heads = range(shape.num_kv_heads)
        page_ids = given.pages_of(row)
        begin = given.first_token(row)
        k = np.stack([_tokens(k_pages, page_ids, h, begin, int(seq_len), shape.page_size) for h in heads])
        v = np.stack([_tokens(v_pages, page_ids, h, begin, int(seq_len), shape.page_size) for h in heads])
        scores = given.logits(row, begin, given.grouped(row) @ k.transpose(0, 2, 1))  # [num_kv_heads, columns, tokens]
        top = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        given.store(out, lse, row, weights @ v / total, (top + np.log(total))[..., 0])
    return given.shaped(out, lse)


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
    options: AttentionOptions = PLAIN,
    sinks: np.ndarray | None = None,
    query_lens: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The same result by the schedule's tasks: online softmax over tiles, then a merge of the partials.

    Arguments and results as in `attention`; `schedule` must have been made for these seq_lens, with
    window = options.reach and, where it has shared reads, query_tokens = options.query_tokens.
    """
    given = _check(shape, q, k_pages, v_pages, block_table, seq_lens, scale, options, sinks, query_lens)
    k_pages, v_pages, step = np.asarray(k_pages), np.asarray(v_pages), given.step
    if len(schedule.split_offsets) != step.batch_size + 1:
        raise ValueError(f"schedule: expected one of {step.batch_size} rows, got {len(schedule.split_offsets) - 1}")
    slots = int(schedule.split_offsets[-1])
    columns = shape.group_size * options.query_tokens
    # A slot that no task writes keeps the empty state, which changes nothing in a merge.
    m = np.full((slots, shape.num_kv_heads, columns), -np.inf)
    l = np.zeros((slots, shape.num_kv_heads, columns))
    acc = np.zeros((slots, shape.num_kv_heads, columns, options.value_dim(shape)))
    own_begin = schedule.split_offsets[:-1].astype(np.int64)  # [batch_size] the first slot of the row's own tasks
    shared = schedule.shared
    if shared is not None:
        _check_shared(shared, schedule.tile_tokens, step, shape)
        own_begin = own_begin + shared.shared_parts()
    for index, (row, kv_head, split, tile_begin, tile_end) in enumerate(schedule.tasks.tolist()):
        read = -1 if shared is None else int(shared.read_of_task[index])
        members = [row] if shared is None or read < 0 else shared.members_of(read).tolist()
        begins = own_begin if read < 0 else schedule.split_offsets
        slots_of = [int(begins[member]) + split for member in members]
        states = [_empty_state(columns, options.value_dim(shape)) for _ in members]
        for tile in range(tile_begin, tile_end):
            begin = tile * schedule.tile_tokens
            end = begin + schedule.tile_tokens
            if read < 0:
                end = min(end, int(step.seq_lens[row]))
            k = _tokens(k_pages, given.pages_of(row), kv_head, begin, end, shape.page_size)
            v = _tokens(v_pages, given.pages_of(row), kv_head, begin, end, shape.page_size)
            for i, member in enumerate(members):
                products = given.grouped(member)[kv_head] @ k.T
                states[i] = _add_tile(states[i], given.logits(member, begin, products[None])[0], v)
        for slot, state in zip(slots_of, states, strict=True):
            m[slot, kv_head], l[slot, kv_head], acc[slot, kv_head] = state
    out, lse = _empty_outputs(shape, given)
    for row in range(step.batch_size):
        begin, end = schedule.split_offsets[row], schedule.split_offsets[row + 1]
        if begin < end:
            given.store(out, lse, row, *merge_states(m[begin:end], l[begin:end], acc[begin:end]))
    return given.shaped(out, lse)


def merge_states(m: np.ndarray, l: np.ndarray, acc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merges partial softmax states over their first axis, exactly.

    m (maxima) and l (sums of exp(score - m)) [states, ...]; acc (sums of exp(score - m) * v)
    [states, ..., head_dim]. An empty state is m = -inf, l = 0, acc = 0.
    Returns out [..., head_dim] and lse [...], natural log; zeros and -inf where every state is empty.
    """
    top = m.max(axis=0)
    safe = np.where(np.isneginf(top), 0.0, top)  # exp(-inf - 0) is 0, where exp(-inf + inf) would be NaN.
    weights = np.exp(m - safe)
    total = (weights * l).sum(axis=0)
    out = (weights[..., None] * acc).sum(axis=0) / np.where(total == 0, 1.0, total)[..., None]
    with np.errstate(divide="ignore"):
        return out, safe + np.log(total)


def _empty_state(columns: int, value_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.full(columns, -np.inf), np.zeros(columns), np.zeros((columns, value_dim))


def _check_shared(shared: SharedReads, tile_tokens: int, step: StepState, shape: DecodeShape) -> None:
    """ValueError unless the members of each read have the same pages under its tiles."""
    assert step.block_table is not None  # run_schedule was given one
    for read, tiles in enumerate(shared.reads["tiles"].tolist()):
        members = shared.members_of(read)
        ids = step.block_table[members, : -(-tiles * tile_tokens // shape.page_size)]
        if (ids != ids[0]).any():
            at, column = (int(i) for i in np.argwhere(ids != ids[0])[0])
            raise ValueError(
                f"block_table[{members[at]}, {column}]: expected {ids[0, column]}, as in row {members[0]} with which "
                f"the schedule reads it, got {ids[at, column]}"
            )


def _add_tile(
    state: tuple[np.ndarray, np.ndarray, np.ndarray], scores: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of online softmax: scores [group_size, tokens], v [tokens, head_dim]."""
    m, l, acc = state
    top = np.maximum(m, scores.max(axis=-1))
    safe = np.where(np.isneginf(top), 0.0, top)  # The mask may hide a whole tile from a query token.
    weights = np.exp(scores - safe[:, None])
    decay = np.exp(m - safe)
    return top, decay * l + weights.sum(axis=-1), decay[:, None] * acc + weights @ v


def _tokens(
    pages: np.ndarray, page_ids: np.ndarray, kv_head: int, begin: int, end: int, page_size: int
) -> np.ndarray:
    """Tokens [begin, end) of a row's KV head as float64 [tokens, head_dim]; loads owned pages only."""
    first, last = begin // page_size, -(-end // page_size)
    loaded = pages[page_ids[first:last], kv_head]  # [pages, page_size, head_dim]
    tokens = loaded.reshape(-1, loaded.shape[-1])[begin - first * page_size : end - first * page_size]
    return tokens.astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Given:
    """Checked arguments; a column is a query head of a KV head's group, for each query token in turn."""

    shape: DecodeShape
    options: AttentionOptions
    step: StepState
    q: np.ndarray  # [batch_size, query_tokens, num_q_heads, head_dim]
    scale: float
    sinks: np.ndarray | None
    query_lens: np.ndarray  # [batch_size]

    def pages_of(self, row: int) -> np.ndarray:
        """The row of the block table, [max_pages] int32."""
        return np.asarray(self.step.block_table)[row]

    def first_token(self, row: int) -> int:
        """The first token that any of the row's query tokens sees."""
        reach = self.options.reach
        return 0 if reach is None else max(0, int(self.step.seq_lens[row]) - reach)

    def grouped(self, row: int) -> np.ndarray:
        """The row's queries, float64 [num_kv_heads, columns, head_dim]."""
        q = self.q[row].astype(np.float64).reshape(-1, self.shape.num_kv_heads, self.shape.group_size, self.q.shape[-1])
        return q.swapaxes(0, 1).reshape(self.shape.num_kv_heads, -1, self.q.shape[-1])

    def logits(self, row: int, begin: int | np.ndarray, products: np.ndarray) -> np.ndarray:
        """Scales, caps and masks q k^T [.., columns, tokens] of tokens from `begin` on, or at begin [tokens]."""
        logits = products * self.scale
        if self.options.soft_cap is not None:
            logits = self.options.soft_cap * np.tanh(logits / self.options.soft_cap)
        length, count = int(self.step.seq_lens[row]), int(self.query_lens[row])
        token = np.arange(products.shape[-2]) // self.shape.group_size
        end = np.minimum(length, length - count + 1 + token)  # [columns]
        at = begin if isinstance(begin, np.ndarray) else begin + np.arange(products.shape[-1])
        seen = at[None, :] < end[:, None]
        if self.options.window is not None:
            seen &= at[None, :] >= end[:, None] - self.options.window
        return np.where(seen, logits, -np.inf)

    def store(self, out: np.ndarray, lse: np.ndarray, row: int, values: np.ndarray, row_lse: np.ndarray) -> None:
        """Writes a row's values [num_kv_heads, columns, v_head_dim] and LSE, sinks folded in."""
        heads, tokens = self.shape.num_kv_heads, self.options.query_tokens
        values = values.reshape(heads, tokens, self.shape.group_size, -1).swapaxes(0, 1)
        values = values.reshape(tokens, heads * self.shape.group_size, -1)
        row_lse = row_lse.reshape(heads, tokens, self.shape.group_size).swapaxes(0, 1).reshape(tokens, -1)
        if self.sinks is not None:
            whole = np.logaddexp(row_lse, self.sinks)
            values, row_lse = values * np.exp(row_lse - whole)[..., None], whole
        live = int(self.query_lens[row])
        out[row, :live], lse[row, :live] = values[:live], row_lse[:live]

    def shaped(self, out: np.ndarray, lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Without the axis of query tokens where there is one a row."""
        return (out[:, 0], lse[:, 0]) if self.options.query_tokens == 1 else (out, lse)


def _empty_outputs(shape: DecodeShape, given: _Given) -> tuple[np.ndarray, np.ndarray]:
    outer = (given.step.batch_size, given.options.query_tokens, shape.num_q_heads)
    return np.zeros((*outer, given.options.value_dim(shape))), np.full(outer, -np.inf)


def _is_float(dtype: np.dtype) -> bool:
    """Whether it is a type of floats, those of ml_dtypes (bfloat16, FP8) among them, which are of no kind to NumPy."""
    return dtype.kind == "f" or dtype.name.startswith(("float", "bfloat"))


def _check(
    shape: DecodeShape,
    q: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    block_table: np.ndarray,
    seq_lens: np.ndarray,
    scale: float | None,
    options: AttentionOptions,
    sinks: np.ndarray | None,
    query_lens: np.ndarray | None,
) -> _Given:
    step = StepState(seq_lens, block_table)
    page_shape = (shape.num_kv_heads, shape.page_size)
    q, k_pages, v_pages = np.asarray(q), np.asarray(k_pages), np.asarray(v_pages)
    sinks = None if sinks is None else np.asarray(sinks)
    num_pages, tokens = (len(k_pages) if k_pages.ndim else 0), options.query_tokens
    tokens_axis = () if tokens == 1 else (tokens,)
    expected = {
        "q": (q, (step.batch_size, *tokens_axis, shape.num_q_heads, shape.head_dim)),
        "k_pages": (k_pages, (num_pages, *page_shape, shape.head_dim)),
        "v_pages": (v_pages, (num_pages, *page_shape, options.value_dim(shape))),
    }
    if options.sinks != (sinks is not None):
        raise ValueError(f"sinks: expected {'float logits' if options.sinks else 'None'} as options say, got {sinks!r}")
    if sinks is not None:
        expected["sinks"] = (sinks, (shape.num_q_heads,))
    for name, (array, want) in expected.items():
        if array.shape != want or not _is_float(array.dtype):
            raise ValueError(f"{name}: expected floats {list(want)}, got {describe(array)}")
    step.check_pages(shape, num_pages=num_pages)
    counts = np.full(step.batch_size, tokens) if query_lens is None else np.asarray(query_lens)
    right = counts.shape == (step.batch_size,) and counts.dtype.kind in "iu"
    if not right or (counts.size and (counts.min() < 0 or counts.max() > tokens)):
        raise ValueError(f"query_lens: expected counts in [0, {tokens}] [{step.batch_size}], got {query_lens!r}")
    short = np.flatnonzero((step.seq_lens > 0) & (step.seq_lens < counts))
    if len(short):
        row = short[0]
        raise ValueError(f"seq_lens[{row}]: expected at least its {counts[row]} query tokens, got {step.seq_lens[row]}")
    if scale is not None and not (is_number(scale) and np.isfinite(scale)):
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")
    scale = shape.head_dim**-0.5 if scale is None else float(scale)
    return _Given(shape, options, step, q.reshape(step.batch_size, tokens, *q.shape[-2:]), scale, sinks, counts)
