"""Which matrix products cuda_src/product.cu and wide_product.cu serve, and what they are compiled for.

Needs neither PyTorch nor a GPU.
"""
from __future__ import annotations

from dataclasses import dataclass

MOST_COLUMNS = 8  # rows of x that the kernel serves
WARPS, TILE_ROWS, CHUNK = 8, 32, 64  # of cuda_src/product.cu
MOST_STAGES, LEAST_STAGES = 4, 2  # of a warp's ring
STORE, ADD, GATE = range(3)  # PRODUCT_END

ROW_BYTES = 128  # of a row in a stage of cuda_src/wide_product.cu
WIDE_COLUMNS = 8, 16, 32, 64, 128  # rows of x that it is compiled for
MOST_WIDE_COLUMNS = 64  # rows of x that it serves
# Rows of x from which on steps give it to wide_product.cu: none. With it a step of 32 rows of 1K of Llama-3.1-8B's
# shape took one H200 6.18 ms, with PyTorch's products and rows.cu beside them 5.86 (2026-11-29). Its variants were not
# tuned: examples/bench_products.py is for that.
LEAST_WIDE_COLUMNS = MOST_WIDE_COLUMNS + 1
GROUP_COLUMNS = 32  # from so many on products are by warpgroups, on GPUs that have them
AHEAD = 8  # units of a CTA that it brings to L2 beyond its ring while the previous kernel runs
LET = 8  # units of a CTA before whose products the next kernel may start
LEAST_UNITS = 4  # of a CTA, so that few parts are sent of small matrices
CTA_KEPT_BYTES = 1024  # of an SM's shared memory, of compute capability 8.0 and newer
CTA_BYTES = 227 * 1024 // 2 - 2048  # of shared memory, such that the next product's CTA fits beside it


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


def has_groups(capability: int) -> bool:
    """Whether GPUs of that compute capability (major * 10 + minor) multiply by warpgroups."""
    return 90 <= capability < 100


@dataclass(frozen=True, slots=True)
class WideVariant:
    """What wide_product.cu is compiled for."""

    depth: int  # elements of a row of the weight
    columns: int  # rows of x, at most
    end: int  # STORE, ADD or GATE
    bfloat16: bool
    tile_rows: int
    stages: int
    groups: int  # PRODUCT_GROUPS: 0, or on compute capability 9.0 how groups of four warps multiply
    ahead: int = 0  # units that are brought to L2 beyond the ring before the previous kernel has ended
    let: int = LET
    per_sm: int = 1  # CTAs

    def shared_bytes(self) -> int:
        """sizeof(WideMemory)."""
        return self.stages * (self.tile_rows + self.columns) * ROW_BYTES

    def unfit(self, capability: int, shared_limit: int) -> str | None:
        """Why a GPU does not run it, None where it does. shared_limit: bytes of shared memory that a CTA may have."""
        if self.groups and not has_groups(capability):
            return f"compute capability {capability / 10:.1f} has no products of warpgroups"
        if self.groups and self.columns < GROUP_COLUMNS:
            return f"products of warpgroups are for {GROUP_COLUMNS} columns or more"
        if self.stages < LEAST_STAGES:
            return f"its shared memory has room for {self.stages} stages, which must be {LEAST_STAGES} or more"
        if self.shared_bytes() < self.part_bytes():
            return f"a part of {self.part_bytes()} bytes does not fit its ring of {self.shared_bytes()}"
        if self.shared_bytes() > shared_limit:
            return f"it takes {self.shared_bytes()} bytes of shared memory, and a CTA has at most {shared_limit} here"
        # Ranges wait for each other, so all CTAs must be there at once; the driver keeps CTA_KEPT_BYTES of each.
        if self.per_sm * (self.shared_bytes() + CTA_KEPT_BYTES) > shared_limit + CTA_KEPT_BYTES:
            return f"an SM has no room for {self.per_sm} CTAs of {self.shared_bytes()} bytes of shared memory"
        return None

    def grid(self, rows: int, num_sms: int) -> int:
        """CTAs of a matrix of so many rows."""
        units = -(-rows // self.tile_rows) * (self.depth // CHUNK)
        return max(1, min(self.per_sm * num_sms, units // LEAST_UNITS))

    def threads(self) -> int:
        """Of a CTA."""
        return 288 if self.groups == 2 else 256

    def part_bytes(self) -> int:
        """Of the workspace, for each CTA."""
        return self.tile_rows * self.columns * 4

    def defines(self) -> dict[str, int | str]:
        return {"DEPTH": self.depth, "COLUMNS": self.columns, "PRODUCT_END": self.end, "PRODUCT_ROWS": self.tile_rows,
                "PRODUCT_STAGES": self.stages, "PRODUCT_GROUPS": self.groups, "PRODUCT_AHEAD": self.ahead,
                "PRODUCT_LET": self.let,
                "PRODUCT_SHARED_BYTES": self.shared_bytes(), "DTYPE_BF16": int(self.bfloat16)}


def wide_variant(*, rows: int, depth: int, columns: int, end: int, bfloat16: bool, capability: int,
                 shared_limit: int) -> WideVariant | None:
    """The kernel of a matrix [rows, depth] and so many columns, None where it does not serve them."""
    if not 0 < columns <= WIDE_COLUMNS[-1] or depth % CHUNK or (end == GATE and rows % 2):
        return None
    columns = next(wide for wide in WIDE_COLUMNS if wide >= columns)
    groups = 0 if columns < GROUP_COLUMNS or not has_groups(capability) else 2 if columns == GROUP_COLUMNS else 1
    if columns > 64 and not groups:
        return None  # mma.sync would be slower than the stream
    tile_rows = 128 if columns <= 64 else 256
    room = min(CTA_BYTES, shared_limit) if columns <= 64 else shared_limit
    stages = room // ((tile_rows + columns) * ROW_BYTES)
    if stages < 3:
        return None
    # A sum follows a product without a norm between, or attention, the pages of whose many rows would drive the weights
    # from L2 again.
    ahead = 0 if end == ADD and columns > 8 else AHEAD
    return WideVariant(depth, columns, end, bfloat16, tile_rows, stages, groups, ahead)
