"""Random paged cases with poison in every byte that no row owns, and their float64 attention."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pkvsim import DecodeShape

UNUSED_ENTRY = 0x7FFFFFFF
MAX_ERROR = {"float16": 2e-3, "bfloat16": 1.6e-2}
MEAN_ERROR = {"float16": 3e-4, "bfloat16": 2.4e-3}
PADDED_ELEMENTS = 1 << 26  # float64 elements of gathered K at a time


@dataclass(frozen=True, slots=True)
class Case:
    """One decode step on the GPU."""

    shape: DecodeShape
    q: torch.Tensor  # [batch_size, num_q_heads, head_dim]
    k_pages: torch.Tensor  # [num_pages, num_kv_heads, page_size, head_dim]
    v_pages: torch.Tensor  # alike
    block_table: torch.Tensor  # [batch_size, max_pages] int32
    seq_lens: torch.Tensor  # [batch_size] int32


def pages_of(seq_lens: np.ndarray, page_size: int) -> np.ndarray:
    return -(-np.asarray(seq_lens, dtype=np.int64) // page_size)


def make_table(seq_lens: np.ndarray, page_size: int, ids: np.ndarray, *, spare_columns: int = 3,
               max_pages: int | None = None) -> np.ndarray:
    """Deals ids out to the rows; entries no row uses are poisoned."""
    pages = pages_of(seq_lens, page_size)
    width = int(pages.max(initial=0)) + spare_columns if max_pages is None else max_pages
    table = np.full((len(pages), width), UNUSED_ENTRY, dtype=np.int32)
    table[np.arange(width)[None, :] < pages[:, None]] = ids[:int(pages.sum())]
    return table


def fill_owned(pool: torch.Tensor, table: np.ndarray, seq_lens: np.ndarray, *, scale: float = 1.0) -> None:
    """Random values where a row owns a token; what it does not own keeps its NaN."""
    page_size = pool.shape[2]
    pages = pages_of(seq_lens, page_size)
    ids = torch.from_numpy(table[np.arange(table.shape[1])[None, :] < pages[:, None]].astype(np.int64)).to(pool.device)
    for some in ids.split(4096):
        pool[some] = (torch.randn((len(some), *pool.shape[1:]), device=pool.device) * scale).to(pool.dtype)
    tails = np.asarray(seq_lens, np.int64) % page_size
    cut = np.flatnonzero(tails)  # rows whose last page, which no other row has, is not full
    last, tails = (torch.from_numpy(array).to(pool.device)
                   for array in (table[cut, pages[cut] - 1].astype(np.int64), tails[cut]))
    past = torch.arange(page_size, device=pool.device) >= tails[:, None]
    pool[last] = pool[last].masked_fill(past[:, None, :, None], float("nan"))


def make_case(shape: DecodeShape, seq_lens, *, dtype: str = "float16", seed: int = 0, spare_pages: int = 5,
              ids: np.ndarray | None = None, num_pages: int | None = None, combined: bool = False) -> Case:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    lens = np.asarray(seq_lens, dtype=np.int32)
    needed = int(pages_of(lens, shape.page_size).sum())
    num_pages = needed + spare_pages if num_pages is None else num_pages
    ids = rng.permutation(num_pages)[:needed] if ids is None else ids
    table = make_table(lens, shape.page_size, ids.astype(np.int32))
    page = (shape.num_kv_heads, shape.page_size, shape.head_dim)
    torch_dtype = getattr(torch, dtype)
    if combined:
        both = torch.full((num_pages, 2, *page), float("nan"), dtype=torch_dtype, device="cuda")
        k_pages, v_pages = both.unbind(1)
    else:
        k_pages = torch.full((num_pages, *page), float("nan"), dtype=torch_dtype, device="cuda")
        v_pages = torch.full_like(k_pages, float("nan"))
    fill_owned(k_pages, table, lens)
    # Half scale: the largest outputs stay below 2, where rounding them alone is far under the bound.
    fill_owned(v_pages, table, lens, scale=0.5)
    q = torch.randn(len(lens), shape.num_q_heads, shape.head_dim, device="cuda").to(torch_dtype)
    return Case(shape=shape, q=q, k_pages=k_pages, v_pages=v_pages, block_table=torch.from_numpy(table).cuda(),
                seq_lens=torch.from_numpy(lens).cuda())


def csr_of(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indptr [batch_size + 1], indices, last_page_len [batch_size]) of the case's rows, int32 on the GPU."""
    lens, table = case.seq_lens.cpu().numpy(), case.block_table.cpu().numpy()
    page_size = case.shape.page_size
    pages = pages_of(lens, page_size)
    indices = table[np.arange(table.shape[1])[None, :] < pages[:, None]]
    last = np.where(lens > 0, (lens - 1) % page_size + 1, 0)
    arrays = np.concatenate([[0], np.cumsum(pages)]), indices, last
    return tuple(torch.from_numpy(array.astype(np.int32)).cuda() for array in arrays)


def attention(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 (out [batch_size, Hq, d], lse [batch_size, Hq]); zeros and -inf for empty rows."""
    shape, rows = case.shape, case.q.shape[0]
    longest = max(1, int(case.seq_lens.max())) if rows else 1
    per_row = longest * shape.num_kv_heads * shape.head_dim
    step = max(1, PADDED_ELEMENTS // per_row)
    parts = [_attention_rows(case, range(at, min(at + step, rows))) for at in range(0, rows, step)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _attention_rows(case: Case, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
    shape = case.shape
    picked = slice(rows.start, rows.stop)
    lens = case.seq_lens[picked].long()  # [R]
    width = max(1, -(-int(lens.max()) // shape.page_size))
    owned = torch.arange(width, device="cuda")[None, :] * shape.page_size < lens[:, None]
    ids = torch.where(owned, case.block_table[picked, :width], 0).long()  # [R, width]
    live = torch.arange(width * shape.page_size, device="cuda")[None, :] < lens[:, None]  # [R, T]

    def gather(pool: torch.Tensor) -> torch.Tensor:  # [R, Hkv, T, d] float64, zero where not live
        tokens = pool[ids].transpose(1, 2).reshape(len(rows), shape.num_kv_heads, -1, shape.head_dim)
        return torch.where(live[:, None, :, None], tokens, 0).double()

    q = case.q[picked].double().view(len(rows), shape.num_kv_heads, -1, shape.head_dim)  # [R, Hkv, G, d]
    scores = q @ gather(case.k_pages).transpose(2, 3) / shape.head_dim**0.5
    scores = scores.masked_fill(~live[:, None, None, :], float("-inf"))  # [R, Hkv, G, T]
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    out = weights @ gather(case.v_pages)
    return out.flatten(1, 2), lse.flatten(1, 2)


def run_poisoned(engine, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a planned engine into NaN-filled outputs, which stale memory cannot imitate."""
    out = torch.full_like(case.q, float("nan"))
    lse = torch.full(case.q.shape[:2], float("nan"), dtype=torch.float32, device="cuda")
    engine.run(case.q, case.k_pages, case.v_pages, out=out, lse=lse)
    torch.cuda.synchronize()
    return out, lse


def errors(out: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(largest, mean) absolute error; a NaN anywhere makes both NaN."""
    difference = (out.double() - expected).abs()
    return (float(difference.max()), float(difference.mean())) if difference.numel() else (0.0, 0.0)


def check(out: torch.Tensor, lse: torch.Tensor, case: Case, *, dtype: str,
          wanted: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[float, float]:
    """Compares with float64, empty rows exactly; call it after the kernel has run. wanted: attention(case), where it is
    at hand."""
    expected, expected_lse = attention(case) if wanted is None else wanted
    empty = case.seq_lens == 0
    assert bool((out[empty] == 0).all()), "empty rows must give zeros"
    assert bool((lse[empty] == float("-inf")).all()), "empty rows must give an LSE of -inf"
    largest, mean = errors(out, expected)
    assert largest <= MAX_ERROR[dtype], f"largest error {largest:.3g}"  # NaN fails too
    assert mean <= MEAN_ERROR[dtype], f"mean error {mean:.3g}"
    lse_error = (lse.double() - expected_lse)[~empty].abs()
    assert lse_error.numel() == 0 or float(lse_error.max()) <= 2e-3, f"LSE error {float(lse_error.max()):.3g}"
    return largest, mean
