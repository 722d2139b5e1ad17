"""One step of a benchmark: laid out in a pool, run once to be checked, timed cold in a CUDA graph."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpu.measure.timing import Timing, graph_time_us, l2_bytes
from pkvsim import DecodeShape
from pkvsim.pricing.counters import useful_kv_bytes

if TYPE_CHECKING:
    import torch

    from gpu.measure.pools import BenchPool

Attend = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], object]  # k_pages, v_pages of a layer, and out


@dataclass(frozen=True, slots=True, eq=False)
class StepCase:
    """A step of rows seq_lens over layers that share its block table and no page."""

    shape: DecodeShape
    seq_lens: np.ndarray  # [batch_size] int32
    kv_bytes: int  # that the step must read
    block_table: np.ndarray  # [batch_size, max_pages] int32
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # (k_pages, v_pages), each [pages, Hkv, page_size, d]
    q: torch.Tensor  # [batch_size, num_q_heads, head_dim]

    def on_gpu(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(seq_lens, block_table) where the pool is."""
        import torch

        seq_lens, block_table = map(torch.from_numpy, (self.seq_lens, self.block_table))
        return seq_lens.to(self.q.device), block_table.to(self.q.device)

    def result(self, attend: Attend) -> torch.Tensor:
        """What attend leaves of a poisoned output on the first layer, like q. Raises what attend raises."""
        import torch

        out = torch.full_like(self.q, float("nan"))
        attend(*self.layers[0], out)
        if out.is_cuda:
            torch.cuda.synchronize()  # what a kernel did wrong is told of here, and not in a timing
        return out

    def time(self, attend: Attend, *, repeats: int) -> Timing:
        """Of attend on cold layers in turn, each call a layer, in a CUDA graph."""
        import torch

        out = torch.empty_like(self.q)

        def run_one(layer: int) -> None:
            attend(*self.layers[layer], out)

        return graph_time_us(run_one, variants=len(self.layers), repeats=repeats)


def lay_out(pool: BenchPool, shape: DecodeShape, seq_lens: np.ndarray, *, seed: int, min_layers: int = 2) -> StepCase:
    """seq_lens [batch_size] int32. seed: of the pages' places and of the queries.

    Raises NoRoom when the pool is too small.
    """
    import torch

    kv_bytes = useful_kv_bytes(shape, seq_lens)
    pages = pool.lay_out(shape, seq_lens, kv_bytes=kv_bytes, l2_size=l2_bytes(), seed=seed, min_layers=min_layers)
    random = torch.Generator(pool.flat.device).manual_seed(seed)
    q = torch.randn(len(seq_lens), shape.num_q_heads, shape.head_dim, device=pool.flat.device, generator=random)
    return StepCase(shape, seq_lens, kv_bytes, pages.block_table, pages.layers, q.to(pool.flat.dtype))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, NaN where one of them has any: compare it as `not difference < tolerance`."""
    return float((found.float() - expected.float()).abs().max())
