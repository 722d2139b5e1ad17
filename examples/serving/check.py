"""Float64 attention of single rows on the GPU, and the pools that a trace's layers read."""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pkvsim import DecodeShape

if TYPE_CHECKING:
    import torch
    from serving.engines import StepInputs

    from gpu.measure.pools import BenchPool

TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}


def row_attention(step: StepInputs, row: int, k_pages: torch.Tensor, v_pages: torch.Tensor) -> torch.Tensor:
    """Float64 [num_q_heads, head_dim], one KV head at a time so that long rows fit."""
    import torch

    num_kv_heads, page_size, head_dim = k_pages.shape[1:]
    length = int(step.seq_lens[row])
    ids = torch.from_numpy(step.table_host[row, : -(-length // page_size)].astype(np.int64)).to(k_pages.device)
    query = step.q[row].double().view(num_kv_heads, -1, head_dim)  # [Hkv, G, d]
    outs = []
    for head in range(num_kv_heads):
        k, v = (pool[ids, head].reshape(-1, head_dim)[:length].double() for pool in (k_pages, v_pages))  # [length, d]
        outs.append(torch.softmax(query[head] @ k.T / head_dim**0.5, dim=-1) @ v)
    return torch.cat(outs)


def float64_error(step: StepInputs, out: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> float:
    """Largest error of the longest and the shortest row."""
    rows = {int(np.argmax(step.seq_lens)), int(np.argmin(step.seq_lens))}
    return max(float((out[row].double() - row_attention(step, row, k_pages, v_pages)).abs().max()) for row in rows)


def layer_caches(
    pool: BenchPool, shape: DecodeShape, num_pages: int, *, wanted: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """As many disjoint (k_pages, v_pages) of num_pages each as fit the pool, at most `wanted`.

    Raises ValueError when not one fits.
    """
    k_all, v_all = pool.pages(shape)
    fits = min(wanted, len(k_all) // num_pages)
    if not fits:
        need = 2 * num_pages * k_all[0].numel() * k_all.element_size() / 2**30
        raise ValueError(
            f"--pool-gib: expected at least {need:.2f} for {num_pages} pages, got {pool.num_bytes / 2**30:.2f}; "
            f"fewer --requests need less"
        )
    return tuple(
        (k_all[at : at + num_pages], v_all[at : at + num_pages]) for at in range(0, fits * num_pages, num_pages)
    )
