"""Which matrix products cuda_src/product.cu serves, and what it is compiled for. Needs neither PyTorch nor a GPU."""
from __future__ import annotations

from dataclasses import dataclass

MOST_COLUMNS = 8  # rows of x that the kernel serves
WARPS, TILE_ROWS, CHUNK = 8, 32, 64  # of cuda_src/product.cu
MOST_STAGES, LEAST_STAGES = 4, 2  # of a warp's ring
STORE, ADD, GATE = range(3)  # PRODUCT_END


@dataclass(frozen=True, slots=True)
class ProductVariant:
    """What the kernel is compiled for."""

    depth: int  # elements of a row of the weight
    columns: int  # rows of x, at most
    normed: bool
    end: int  # STORE, ADD or GATE
    bfloat16: bool
    stages: int

    def shared_bytes(self) -> int:
        """sizeof(ProductMemory)."""
        ring = WARPS * self.stages * TILE_ROWS * CHUNK * 2
        return ring + self.columns * (2 * self.depth + 64) + 2 * WARPS * TILE_ROWS * 8 * 4 + WARPS * 8 * 4

    def defines(self) -> dict[str, int | str]:
        return {"DEPTH": self.depth, "COLUMNS": self.columns, "NORMED": int(self.normed), "PRODUCT_END": self.end,
                "PRODUCT_STAGES": self.stages, "PRODUCT_SHARED_BYTES": self.shared_bytes(),
                "DTYPE_BF16": int(self.bfloat16)}


def variant(*, rows: int, depth: int, columns: int, normed: bool, end: int, bfloat16: bool,
            shared_limit: int) -> ProductVariant | None:
    """The kernel of a matrix [rows, depth] and so many columns, None where it does not serve them."""
    if columns > MOST_COLUMNS or rows % TILE_ROWS or depth % CHUNK:
        return None
    columns = 1 << (columns - 1).bit_length()
    for stages in range(MOST_STAGES, LEAST_STAGES - 1, -1):
        found = ProductVariant(depth, columns, normed, end, bfloat16, stages)
        if found.shared_bytes() <= shared_limit:
            return found
    return None
