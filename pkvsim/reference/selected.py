"""Decode attention over lists of pages in float64, what each page gets of it, and lists as rows of a plain step."""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.reference.attention import _check, _empty_outputs
from pkvsim.schedule.page_lists import PageList, check_lists, list_tokens
from pkvsim.shapes import DecodeShape, check_int


def selected_attention(
    shape: DecodeShape,
    q: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    block_table: np.ndarray,
    seq_lens: np.ndarray,
    lists: PageList,
    *,
    scale: float | None = None,
    options: AttentionOptions = PLAIN,
    sinks: np.ndarray | None = None,
    query_lens: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """pkvsim.reference.attention over the tokens of the listed pages alone; (out, lse) as there.

    A list without pages gives zeros and -inf, without the sink. Raises ValueError naming the argument, window among
    them: a list says itself what is read.
    """
    if options.window is not None:
        raise ValueError(f"window: expected None with lists of pages, got {options.window}")
    given = _check(shape, q, k_pages, v_pages, block_table, seq_lens, scale, options, sinks, query_lens)
    k_pages, v_pages = np.asarray(k_pages), np.asarray(v_pages)
    pages, counts = check_lists(lists, shape, seq_lens)
    out, lse = _empty_outputs(shape, given)
    for row, seq_len in enumerate(given.step.seq_lens.tolist()):
        live, q_of_row = int(given.query_lens[row]), given.grouped(row)
        for head in range(shape.num_kv_heads):
            at = tokens_of(pages[row, head, : counts[row, head]], seq_len, shape.page_size)
            if len(at) == 0:
                continue
            ids, slots = given.pages_of(row)[at // shape.page_size], at % shape.page_size
            k, v = (pool[ids, head, slots].astype(np.float64) for pool in (k_pages, v_pages))
            scores = given.logits(row, at, (q_of_row[head] @ k.T)[None])[0]  # [columns, tokens]
            top = scores.max(axis=-1, keepdims=True)
            safe = np.where(np.isneginf(top), 0.0, top)  # A query token may see none of the list.
            weights = np.exp(scores - safe)
            total = weights.sum(axis=-1, keepdims=True)
            values = weights @ v / np.where(total == 0, 1.0, total)
            with np.errstate(divide="ignore"):
                own_lse = (safe + np.log(total))[:, 0]
            heads = slice(head * shape.group_size, (head + 1) * shape.group_size)
            own_lse = own_lse.reshape(options.query_tokens, shape.group_size)
            values = values.reshape(options.query_tokens, shape.group_size, -1)
            if given.sinks is not None:
                whole = np.logaddexp(own_lse, given.sinks[heads])
                values, own_lse = values * np.exp(own_lse - whole)[..., None], whole
            out[row, :live, heads], lse[row, :live, heads] = values[:live], own_lse[:live]
    return given.shaped(out, lse)


def tokens_of(places: np.ndarray, seq_len: int, page_size: int) -> np.ndarray:
    """Tokens of a row's pages at these places [count], int64, those past the row's end left out."""
    at = (places.astype(np.int64)[:, None] * page_size + np.arange(page_size)).reshape(-1)
    return at[at < seq_len]


def page_lse(
    shape: DecodeShape, q: np.ndarray, k_pages: np.ndarray, block_table: np.ndarray, seq_lens: np.ndarray, *,
    tokens: int | None = None, scale: float | None = None, options: AttentionOptions = PLAIN,
) -> np.ndarray:  # fmt: skip
    """Log-sum-exp of the logits of every page for each query head, float64 [batch_size, num_kv_heads, most pages,
    group_size], -inf where there is nothing to see; exp(page_lse - lse) is the page's share of the attention.

    tokens: of what counts as a page, by default page_size; the kernels write one for every 16. With several query
    tokens [batch_size, num_kv_heads, most pages, query_tokens, group_size]. Arguments as attention's; sinks and V have
    no part in it.
    """
    options = replace(options, sinks=False, v_head_dim=None)
    given = _check(shape, q, k_pages, k_pages, block_table, seq_lens, scale, options, None, None)
    k_pages = np.asarray(k_pages)
    tokens = shape.page_size if tokens is None else check_int("tokens", tokens, 1)
    most = -(-int(given.step.seq_lens.max(initial=0)) // tokens)
    inner = options.query_tokens, shape.group_size
    found = np.full((given.step.batch_size, shape.num_kv_heads, most, *inner), -np.inf)
    for row, seq_len in enumerate(given.step.seq_lens.tolist()):
        at = np.arange(seq_len)
        ids, slots = given.pages_of(row)[at // shape.page_size], at % shape.page_size
        k = k_pages[ids, :, slots].astype(np.float64).swapaxes(0, 1)  # [num_kv_heads, tokens, head_dim]
        logits = given.logits(row, 0, given.grouped(row) @ k.swapaxes(1, 2))  # [num_kv_heads, columns, tokens]
        for page in range(-(-seq_len // tokens)):
            values = np.logaddexp.reduce(logits[..., page * tokens : (page + 1) * tokens], axis=-1)
            found[row, :, page] = values.reshape(shape.num_kv_heads, *inner)
    return found[..., 0, :] if options.query_tokens == 1 else found


def fold_lists(
    shape: DecodeShape, k_pages: np.ndarray, v_pages: np.ndarray, block_table: np.ndarray, seq_lens: np.ndarray,
    lists: PageList,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """A step's lists as the rows of a plain one with one KV head: (k_pages, v_pages, block_table, seq_lens).

    Row v is head v % num_kv_heads of row v // num_kv_heads; page id * num_kv_heads + head is that head of page id. This
    is how an engine that knows of no lists serves them: heads folded into the batch, a table made anew for every step.
    The pools are views, [num_pages * num_kv_heads, 1, page_size, ..]. Right for one query token.
    """
    pages, counts = check_lists(lists, shape, seq_lens)
    heads, most = shape.num_kv_heads, pages.shape[2]
    valid = np.arange(most) < counts[..., None]
    ids = np.take_along_axis(np.asarray(block_table)[:, None], np.where(valid, pages, 0).astype(np.int64), axis=2)
    table = np.where(valid, ids.astype(np.int64) * heads + np.arange(heads)[:, None], 0).astype(np.int32)
    folded = [pool.reshape(-1, 1, *pool.shape[2:]) for pool in (k_pages, v_pages)]
    tokens = list_tokens(lists, shape, seq_lens).astype(np.int32)
    return folded[0], folded[1], table.reshape(-1, most), tokens.reshape(-1)
