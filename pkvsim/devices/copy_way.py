"""Which way KV blocks go between pinned host memory and a GPU's pages, by the sizes from which on each is the fastest.

    KERNEL   a few CTAs read or write host memory run by run: full rate one way, two thirds with both ways at once
    DMA      the copy engines move each run: full rate both ways, given long runs
    STAGED   the copy engines move pieces of several layers of a block to and from a ring in the GPU's memory, and a
             kernel spreads or collects the runs there, where that is nothing against the memory's own rate

Sizes are of one H200 on PCIe 5.0 x16, 29 November 2026, GB/s to the GPU and to the host, alone and with both at once:
kernels 50.4 and 51.5, 30 and 34 at any run; DMA 32.4 and 34.0, 19 and 19 with runs of 32 KiB (a copy takes the driver
0.86 us), 51.2 and 43.4, 46 and 34 with 64 KiB, 54.3 and 50.1, 46 and 46 with 512 KiB; staged 53.8 and 53.7, 50 and 49
with 16 and 64 KiB, 53.5 and 52.2, 49 and 48 or 50 and 26 with 4 KiB (gpu.cache.dma.ask_for_queues has what that takes).
Decode steps beside a load are 5.8 % slower while DMA brings runs of 64 KiB, 16 % while staging does, whose bytes cross
HBM three times, and 18 % while kernels do. So runs that DMA brings at its rate are not staged on their way to the GPU.
"""
from __future__ import annotations

KERNEL, DMA, STAGED = "kernel", "dma", "staged"
COPY_WAYS = (KERNEL, DMA, STAGED)
KIB = 2**10
# Pieces that are worth staging: of two layers and more, and at least this long. From the figures of DMA, whose time a
# piece is 0.23 us and its bytes at 51 GB/s; measured are pieces of 512 KiB and more.
STAGED_FROM_BYTES = 256 * KIB
PIECE_BYTES = 512 * KIB  # that layers are put together for
# Runs from which on the copy engines need neither kernels nor staging, to the GPU and to the host.
DMA_FROM_BYTES = 64 * KIB, 512 * KIB


def layers_in_piece(num_layers: int, layer_bytes: int, *, most_bytes: int, whole: bool) -> int:
    """How many layers of a block are moved as one piece: as few as make PIECE_BYTES, so that the first ones are there
    early, or all (whole), but no more than most_bytes hold. At least 1. layer_bytes: K and V of a page of one layer."""
    wanted = num_layers if whole else -(-PIECE_BYTES // layer_bytes)
    return max(1, min(num_layers, wanted, most_bytes // layer_bytes))


def choose_copy_way(run_bytes: int, piece_bytes: int, *, to_host: bool) -> str:
    """One of COPY_WAYS for blocks that lie in runs of run_bytes on the GPU; piece_bytes: of layers_in_piece()."""
    if run_bytes >= DMA_FROM_BYTES[to_host]:
        return DMA
    return STAGED if piece_bytes >= max(STAGED_FROM_BYTES, 2 * run_bytes) else KERNEL
