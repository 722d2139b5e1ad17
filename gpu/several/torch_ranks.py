"""What groups of one rank for each process have in common: a torch.distributed process group."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pkvsim.schedule.shares import MAX_RANKS
from pkvsim.shapes import check_int


class TorchRank:
    """This process's rank of a process group, by default of all processes."""

    in_kernel: bool

    def __init__(self, process_group: object = None, *, device: int | None = None) -> None:
        """device: by default torch's current one. Raises ValueError naming the argument."""
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            raise ValueError("process_group: expected torch.distributed to be initialised (init_process_group)")
        self._process_group = dist.group.WORLD if process_group is None else process_group
        self.num_ranks, self._rank = dist.get_world_size(self._process_group), dist.get_rank(self._process_group)
        if not 2 <= self.num_ranks <= MAX_RANKS:
            raise ValueError(f"process_group: expected 2 to {MAX_RANKS} ranks, got {self.num_ranks}")
        self.ranks = (self._rank,)
        self._device = -1
        if torch.cuda.is_available():
            self._device = torch.cuda.current_device()
            if device is not None:
                self._device = check_int("device", device, 0, torch.cuda.device_count() - 1)

    def device(self, rank: int) -> int:
        return self._device

    def sharers(self, rank: int) -> int:
        return 1

    @contextlib.contextmanager
    def use(self, rank: int) -> Iterator[None]:
        """Streams stay the caller's."""
        import cupy
        import torch

        with cupy.cuda.Device(self._device), torch.cuda.device(self._device):
            yield

    def barrier(self) -> None:
        import torch
        import torch.distributed as dist

        if self._device >= 0:
            torch.cuda.synchronize(self._device)
        dist.barrier(self._process_group)
