"""The paper's single calls on the GPU at hand: isolated rows, split counts, raggedness, group sizes."""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from serving.check import TOLERANCE
from serving.engines import EngineSet, make_step
from serving.run import step_splits

from gpu.measure.cases import difference, lay_out
from gpu.measure.timing import graph_time_us, shared_stream
from gpu.routes.route_engines import BACKENDS
from pkvsim.pricing.counters import useful_kv_bytes

if TYPE_CHECKING:
    import torch
    from serving.run import Bench

ISOLATED_TOKENS = (8192, 32768, 65536)
SPLITS = (1, 2, 4, 8, 16, 32, 64)
SPREADS = (1, 2, 4, 8, 16, 32)
RAGGED_ROWS, RAGGED_MEAN = 8, 16384
GROUP_HEADS = ((32, 32), (32, 8), (32, 4))
SDPA = "repack + torch sdpa"


def spread_lengths(spread: int, *, rows: int = RAGGED_ROWS, mean: int = RAGGED_MEAN) -> np.ndarray:
    """Lengths in geometric steps, the longest `spread` times the shortest, of that mean (to a token), int32 [rows]."""
    steps = spread ** np.linspace(0, 1, rows)
    return np.round(steps * mean / steps.mean()).astype(np.int32)


def group_cases() -> dict[str, np.ndarray]:
    """The steps of the sweep over group sizes."""
    return {
        "1 x 8K": np.full(1, 8192, np.int32),
        "8 x 8K": np.full(8, 8192, np.int32),
        "8 rows, one of 64K": np.array([65536] + [8192] * 7, np.int32),
        "1 x 64K": np.full(1, 65536, np.int32),
    }


def time_cell(
    bench: Bench,
    engines: EngineSet,
    seq_lens: np.ndarray,
    *,
    names: tuple[str, ...] | None = None,
    splits: dict[str, np.ndarray | None] | None = None,
    repack: bool = False,
) -> dict[str, float]:
    """Cold kernel time in a CUDA graph by engine, us. splits: of split and workqueue, the policy's own by default.

    A FlashInfer engine whose result differs from balanced's is left out. Raises RuntimeError when ours differ.
    """
    shape = engines.shape
    case = lay_out(bench.pool, shape, seq_lens, seed=20260623)
    splits = step_splits(bench, engines, seq_lens) if splits is None else splits
    step = replace(make_step(shape, seq_lens, case.block_table, splits, dtype=bench.pool.flat.dtype), q=case.q)
    expected, found = None, {}
    chosen = engines.routes if names is None else [name for name in names if name in engines.engines]
    for name in sorted(chosen, key=lambda route: route != "balanced"):
        engine = engines.engines[name]
        attend = partial(engine.run, step)
        with shared_stream():
            engine.plan(step)
            out = case.result(attend)
        expected = out if expected is None else expected
        if not difference(out, expected) < TOLERANCE[bench.dtype]:
            if name not in BACKENDS:
                raise RuntimeError(f"{name}: differs from balanced at lengths {seq_lens.tolist()}")
            continue
        found[name] = round(case.time(attend, repeats=max(3, bench.repeats)).median_us, 2)
    if repack and len(seq_lens) == 1:
        timing = graph_time_us(lambda i: _repack_and_attend(step, *case.layers[i]), variants=len(case.layers))
        found[SDPA] = round(timing.median_us, 2)
    return found


def _repack_and_attend(step: object, k_pages: torch.Tensor, v_pages: torch.Tensor) -> torch.Tensor:
    """One row gathered into contiguous K and V, then torch's attention with the group's heads as its queries."""
    from torch.nn.functional import scaled_dot_product_attention

    num_kv_heads, head_dim, length = k_pages.shape[1], k_pages.shape[3], int(step.seq_lens[0])
    ids = step.packed.indices.long()
    k, v = (
        pool[ids].transpose(0, 1).reshape(1, num_kv_heads, -1, head_dim)[:, :, :length] for pool in (k_pages, v_pages)
    )
    return scaled_dot_product_attention(step.q.view(1, num_kv_heads, -1, head_dim), k, v)


def isolated(bench: Bench, engines: EngineSet, *, quick: bool) -> list[dict]:
    """One row of each length on every engine."""
    found = []
    for tokens in ISOLATED_TOKENS[:1] if quick else ISOLATED_TOKENS:
        lens = np.full(1, tokens, np.int32)
        found.append(
            {
                "tokens": tokens,
                "kv_bytes": useful_kv_bytes(engines.shape, lens),
                "us": time_cell(bench, engines, lens, repack=True),
                "limit_us": round(bench.limit.time_us(useful_kv_bytes(engines.shape, lens)), 2),
            }
        )
    return found


def split_sweep(bench: Bench, engines: EngineSet, *, quick: bool) -> list[dict]:
    """1 x 8K on the paper's split kernel and on the workqueue, by split count."""
    lens = np.full(1, 8192, np.int32)
    return [
        {
            "splits": count,
            "us": time_cell(
                bench,
                engines,
                lens,
                names=("split", "workqueue"),
                splits=dict.fromkeys(("split", "workqueue"), np.full(1, count, np.int64)),
            ),
        }
        for count in (SPLITS[::3] if quick else SPLITS)
    ]


def raggedness(bench: Bench, engines: EngineSet, *, quick: bool) -> list[dict]:
    """RAGGED_ROWS rows of one mean length, ever more unequal."""
    return [
        {"spread": spread, "seq_lens": (lens := spread_lengths(spread)).tolist(), "us": time_cell(bench, engines, lens)}
        for spread in (SPREADS[::3] if quick else SPREADS)
    ]


def group_sweep(bench: Bench, engines: EngineSet, *, quick: bool) -> list[dict]:
    """The cases at the group size of these engines."""
    cases = list(group_cases().items())
    return [
        {"group": engines.shape.group_size, "case": case, "us": time_cell(bench, engines, lens)}
        for case, lens in (cases[:2] if quick else cases)
    ]
