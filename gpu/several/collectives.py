"""GPUs that do not reach each other's memory: torch.distributed's collectives carry the states (NCCL; gloo on CPUs)."""
from __future__ import annotations

from typing import Any

from gpu.several.group import Inboxes
from gpu.several.torch_ranks import TorchRank


class CollectiveGroup(TorchRank):
    """The ranks of a torch.distributed process group, wherever their GPUs are.

    A step is a launch that leaves its states, a collective, and a launch that merges them in the order of the ranks:
    the results of the other groups to the bit. NCCL's collectives are captured in CUDA graphs with the launches.
    """

    in_kernel = False

    def inboxes(self, num_bytes: int) -> dict[int, Inboxes]:
        """A rank reaches its own alone, and leaves its states there."""
        import cupy

        with self.use(self._rank):
            box = cupy.full(num_bytes, 0xFF, dtype=cupy.uint8)
            cupy.cuda.get_current_stream().synchronize()
        self.barrier()
        return {self._rank: Inboxes(box.data.ptr, (box.data.ptr,) * self.num_ranks, (box,))}

    def exchange(self, rank: int, sent: Any, received: Any,
                 counts: tuple[tuple[int, ...], tuple[int, ...]] | None) -> None:
        """sent, received: torch tensors [n] uint8."""
        import torch.distributed as dist

        if counts is None:
            dist.all_gather_into_tensor(received, sent, group=self._process_group)
        else:
            dist.all_to_all_single(received, sent, list(counts[1]), list(counts[0]), group=self._process_group)
