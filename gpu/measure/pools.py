"""A pool of random pages, and for every measured step as many disjoint copies of its KV as keep the L2 cold."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpu.measure.memory import NoRoom
from gpu.measure.timing import rotation_length
from pkvsim import DecodeShape

if TYPE_CHECKING:
    import torch

FILL_ELEMENTS = 1 << 30
HALF_ELEMENTS = 512  # what each half is a multiple of, so that V pages start on a boundary whatever the pool's size


@dataclass(frozen=True, slots=True)
class CellPages:
    """Layers of one step: the same block table over views of the pool that share no page."""

    block_table: np.ndarray  # [batch_size, max_pages] int32
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # (k_pages, v_pages), each [pages, Hkv, page_size, d]


class BenchPool:
    """One allocation of random values, halves for K and V, seen as pages of any shape."""

    __slots__ = ("flat",)

    def __init__(self, *, pool_gib: float, dtype: torch.dtype, seed: int) -> None:
        import torch

        self.flat = torch.empty(pool_elements(pool_gib), dtype=dtype, device="cuda")
        generator = torch.Generator(device="cuda").manual_seed(seed)
        for chunk in self.flat.split(FILL_ELEMENTS):
            chunk.normal_(generator=generator)

    @property
    def num_bytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    def pages(self, shape: DecodeShape) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V over the whole pool, [num_pages, num_kv_heads, page_size, head_dim] each."""
        half = self.flat.numel() // 2
        page_elements = shape.num_kv_heads * shape.page_size * shape.head_dim
        count = half // page_elements
        views = (self.flat[start:start + count * page_elements] for start in (0, half))
        k_pages, v_pages = (view.view(count, shape.num_kv_heads, shape.page_size, shape.head_dim) for view in views)
        return k_pages, v_pages

    def lay_out(self, shape: DecodeShape, seq_lens: np.ndarray, *, kv_bytes: int, l2_size: int, seed: int,
                min_layers: int = 2) -> CellPages:
        """Scatters the rows' pages at random; every layer reads other pages through the same table.

        Ids are multiples of the number of layers and layer i's view starts at a page that is i modulo
        that number, so no two layers share a page; the starts are random, so neither do they share
        the neighbourhood that a TLB entry covers.
        """
        rng = np.random.default_rng(seed)
        k_all, v_all = self.pages(shape)
        num_pages = k_all.shape[0]
        pages_per_row = -(-seq_lens // shape.page_size)
        needed = int(pages_per_row.sum())
        cold = rotation_length(kv_bytes, l2_size=l2_size)
        layers = max(cold, min_layers)
        if layers > cold and needed > num_pages // 2 // layers:
            layers = cold
        span = num_pages // 2 if layers > 1 else num_pages
        if needed > span // layers:
            raise NoRoom(f"pool-gib: expected room for {layers} x {needed} pages, got {num_pages} pages in all")
        ids = rng.permutation(span // layers)[:needed].astype(np.int32) * layers
        block_table = np.zeros((len(seq_lens), max(1, int(pages_per_row.max()))), dtype=np.int32)
        block_table[np.arange(block_table.shape[1])[None, :] < pages_per_row[:, None]] = ids
        starts = [0]
        if layers > 1:
            strides = max(1, (num_pages - span) // layers - 1)
            starts = (rng.integers(0, strides, layers) * layers + np.arange(layers)).tolist()
        return CellPages(block_table=block_table,
                         layers=tuple((k_all[at:at + span], v_all[at:at + span]) for at in starts))


def pool_elements(pool_gib: float) -> int:
    """16-bit elements of a pool of at most that size, two halves of whole HALF_ELEMENTS."""
    return int(pool_gib * 2**30) // 2 // (2 * HALF_ELEMENTS) * (2 * HALF_ELEMENTS)
