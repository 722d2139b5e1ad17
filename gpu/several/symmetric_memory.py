"""A process for each GPU, under torchrun: torch's symmetric memory tells where the peers' inboxes are mapped."""
from __future__ import annotations

from gpu.several.group import Inboxes
from gpu.several.torch_ranks import TorchRank


class SymmetricGroup(TorchRank):
    """The ranks of a torch.distributed process group, whose GPUs reach each other's memory over NVLink or PCIe.

    Runs go to the caller's current stream. No multicast is used: TORCH_SYMM_MEM_DISABLE_MULTICAST=1 keeps torch from
    setting it up.
    """

    in_kernel = True

    def inboxes(self, num_bytes: int) -> dict[int, Inboxes]:
        import torch
        import torch.distributed._symmetric_memory as symmetric

        self.barrier()  # a step of an engine that was dropped may still write into memory that is used again here
        with torch.cuda.device(self._device):
            memory = symmetric.empty(num_bytes, dtype=torch.uint8, device=f"cuda:{self._device}")
            handle = symmetric.rendezvous(memory, self._process_group)
            memory.fill_(0xFF)
            torch.cuda.synchronize()
        self.barrier()  # nobody writes into a peer's inbox before it is filled
        begin = memory.data_ptr() - handle.buffer_ptrs[self._rank]  # of the memory in the buffer that is mapped
        reached = tuple(int(pointer) + begin for pointer in handle.buffer_ptrs)
        return {self._rank: Inboxes(reached[self._rank], reached, (memory, handle))}

    def exchange(self, rank: int, sent: object, received: object, counts: object) -> None:
        raise RuntimeError("exchange: the ranks of a SymmetricGroup reach each other's memory")
