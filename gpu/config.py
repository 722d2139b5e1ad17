"""Which kernel variant a shape runs: the compile-time constants of cuda_src and what they cost in shared memory."""
from __future__ import annotations

from dataclasses import dataclass

from pkvsim import DecodeShape

TILE_TOKENS = 16  # PKV_TILE in cuda_src/plan.cuh
PACKET_BYTES = 16  # pkv::Packet in cuda_src/state.cuh
MAX_GROUP_SIZE = 32
MAX_ACCUMULATED = 4096  # query heads x head_dim whose FP32 accumulators a warp's registers hold
DTYPES = {"float16": 0, "bfloat16": 1}  # value of DTYPE_BF16
HEAD_DIMS = (64, 128, 256)

# Shared memory a CTA may use, bytes, by compute capability (CUDA C++ programming guide, table of technical
# specifications: 1 KiB less than the SM's maximum).
SHARED_LIMIT_BYTES = {80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024,
                      100: 227 * 1024, 103: 227 * 1024, 120: 99 * 1024, 121: 99 * 1024}

# (warps, stages) by head_dim, best first; the first that fits is taken. More than 128 KiB in flight gained nothing on
# an H200 and cost 1 us at 1 x 8K (2026-11-21).
_CHOICES = {64: ((8, 4), (8, 3), (8, 2), (4, 4), (4, 3), (4, 2), (2, 2)),
            128: ((8, 2), (4, 4), (4, 3), (4, 2), (2, 2), (2, 1)),
            256: ((4, 2), (2, 2), (2, 1), (1, 1))}


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Compile-time constants of one kernel variant."""

    head_dim: int
    group_size: int
    page_size: int
    dtype: str
    warps: int
    stages: int  # tiles of K and V each warp keeps in its ring

    @property
    def shared_bytes(self) -> int:
        """Bytes of pkv::SharedMemory: rings, the warps' states (rows padded by 4 floats), their (m, l), a kept state."""
        ring = self.warps * self.stages * 2 * TILE_TOKENS * self.head_dim * 2
        states = self.warps * self.group_size * ((self.head_dim + 4) * 4 + 8)
        return (ring + states + 15) // 16 * 16 + self.state_bytes

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def state_bytes(self) -> int:
        """Bytes of the packets of one (row, KV head) partial state."""
        return self.group_size * self.head_dim // 2 * PACKET_BYTES

    def defines(self) -> dict[str, int]:
        return {"HEAD_DIM": self.head_dim, "GROUP_SIZE": self.group_size, "PAGE_SIZE": self.page_size,
                "DTYPE_BF16": DTYPES[self.dtype], "WARPS": self.warps, "STAGES": self.stages,
                "SHARED_BYTES": self.shared_bytes}


def kernel_config(shape: DecodeShape, dtype: str, compute_capability: int) -> KernelConfig:
    """The variant for a shape on a GPU (compute capability as major * 10 + minor).

    Raises ValueError naming the argument that no kernel serves.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    if shape.head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: expected one of {HEAD_DIMS}, got {shape.head_dim}")
    if shape.group_size > MAX_GROUP_SIZE:
        raise ValueError(f"group_size: expected at most {MAX_GROUP_SIZE}, got {shape.group_size}")
    if shape.group_size * shape.head_dim > MAX_ACCUMULATED:
        raise ValueError(f"group_size: expected at most {MAX_ACCUMULATED // shape.head_dim} with head_dim {shape.head_dim}, "
                         f"got {shape.group_size}")
    if shape.page_size > 256:
        raise ValueError(f"page_size: expected 1 to 256, got {shape.page_size}")
    if compute_capability < 80:
        raise ValueError(f"device: expected compute capability 8.0 or newer, got {compute_capability / 10:.1f}")
    # An architecture that is not listed gets the smallest limit of those that are.
    limit = SHARED_LIMIT_BYTES.get(compute_capability, min(SHARED_LIMIT_BYTES.values()))
    for warps, stages in _CHOICES[shape.head_dim]:
        config = KernelConfig(shape.head_dim, shape.group_size, shape.page_size, dtype, warps, stages)
        if config.shared_bytes <= limit:
            return config
    raise ValueError(f"shape: no kernel variant of head_dim {shape.head_dim} and group_size {shape.group_size} fits "
                     f"{limit} bytes of shared memory")
