"""What ranks write to each other: an inbox of each, as cuda_src/inbox.cuh lays it out, and the kernel's constants."""
from __future__ import annotations

from dataclasses import dataclass

from gpu.kernels.variant import KernelConfig, kernel_config
from pkvsim import DecodeShape
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.schedule.shares import MAX_RANKS
from pkvsim.shapes import check_int

HEAD_BYTES = 128  # pkv::Inbox
EMPTY_WORD = 0xFFFFFFFF  # EMPTY_WORD in cuda_src/state.cuh
OWNERS = {"all": 0, "row": 1, "head": 2}  # pkv::Owner


@dataclass(frozen=True, slots=True)
class RankConfig:
    """One variant of the kernel of several ranks, and the sizes that follow from it."""

    kernel: KernelConfig
    num_ranks: int
    max_places: int  # (row, KV head of the schedule)s of a step at most

    def defines(self) -> dict[str, int]:
        return self.kernel.defines() | {"RANKS": self.num_ranks}

    @property
    def shared_bytes(self) -> int:
        return self.kernel.shared_bytes + self.kernel.warps * opened_bytes(self.num_ranks)

    @property
    def half_slots(self) -> int:
        """Slots of a half of an inbox: of every rank, for every place."""
        return self.num_ranks * self.max_places

    @property
    def inbox_bytes(self) -> int:
        return HEAD_BYTES + 2 * self.half_slots * self.kernel.state_bytes

    def workspace_bytes(self, num_ctas: int) -> int:
        """Of the balanced kernel's workspace, and a word of each warp."""
        return self.kernel.workspace_bytes(num_ctas) + num_ctas * self.kernel.warps * 4


def opened_bytes(num_ranks: int) -> int:
    """Bytes of pkv::OpenedStep, of which each warp has one in shared memory."""
    return num_ranks * 8 + 8


def rank_config(shape: DecodeShape, dtype: str, compute_capability: int, *, num_ranks: int, max_batch: int,
                variant: tuple[int, int] | None = None, options: AttentionOptions = PLAIN) -> RankConfig:
    """The variant for a shape on a GPU, as kernel_config; max_batch: rows of a step at most.

    Raises ValueError naming the argument that no kernel serves.
    """
    check_int("num_ranks", num_ranks, 2, MAX_RANKS)
    check_int("max_batch", max_batch, 1)
    if options.window is not None:
        raise ValueError(f"window: expected None with several ranks, of which none knows where its tokens lie in a "
                         f"row, got {options.window}")
    if options.query_tokens != 1:
        raise ValueError(f"query_tokens: expected 1 with several ranks, got {options.query_tokens}")
    config = kernel_config(shape, dtype, compute_capability, variant=variant, options=options,
                           spare_bytes=8 * opened_bytes(num_ranks))  # of the most warps that a variant has
    return RankConfig(config, num_ranks, max_batch * shape.num_kv_heads * config.head_split)


def owned(owner: str, rank: int, *, num_ranks: int, batch_size: int, num_kv_heads: int) -> tuple[range, range]:
    """(rows, KV heads) whose outputs are the rank's. As pkv::Ownership."""
    def part(count: int) -> range:
        return range(count * rank // num_ranks, count * (rank + 1) // num_ranks)

    rows, heads = range(batch_size), range(num_kv_heads)
    if owner == "row":
        return part(batch_size), heads
    return rows, part(num_kv_heads) if owner == "head" else heads


def owned_places(owner: str, rank: int, *, num_ranks: int, batch_size: int, num_kv_heads: int,
                 head_split: int = 1) -> tuple[int, int]:
    """[begin, end) of the slots of each source that the rank merges. As pkv::Ownership."""
    if owner == "all":
        return 0, batch_size * num_kv_heads * head_split
    units, each = (batch_size, num_kv_heads * head_split) if owner == "row" else (num_kv_heads, head_split * batch_size)
    return units * rank // num_ranks * each, units * (rank + 1) // num_ranks * each
