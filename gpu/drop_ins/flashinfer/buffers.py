"""A step's CSR arrays on the GPU, for FlashInfer's wrapper: copies of what came, or the caller's fixed buffers."""
from __future__ import annotations

import torch


class CsrBuffers:
    """indptr [batch_size + 1], indices [num_indices] and last_page_len [batch_size] of the last step, on one device.

    With fixed buffers they are those at every step, whole, so that a captured graph may read them.
    """

    __slots__ = ("indptr", "indices", "last_page_len", "_fixed")

    def __init__(self, fixed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None) -> None:
        """fixed: buffers for indptr [batch_size + 1], indices [the most ever], last_page_len [batch_size]."""
        self._fixed = fixed is not None
        self.indptr, self.indices, self.last_page_len = fixed or (None, None, None)

    def update(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, *, device: torch.device,
        non_blocking: bool = True,
    ) -> None:
        """Takes a step's arrays, each on the host or on `device`. Raises ValueError naming the argument."""
        given = {"indptr": indptr, "indices": indices, "last_page_len": last_page_len}
        for name, array in given.items():
            if not isinstance(array, torch.Tensor) or array.dim() != 1:
                found = list(array.shape) if isinstance(array, torch.Tensor) else type(array).__name__
                raise ValueError(f"{name}: expected a torch.Tensor of one axis, got {found}")
        if not self._fixed:
            self.indptr, self.indices, self.last_page_len = (
                array.to(device, non_blocking=non_blocking) for array in given.values())
            return
        batch_size, room = len(self.last_page_len), len(self.indices)
        if len(last_page_len) != batch_size:
            raise ValueError(f"last_page_len: expected the fixed batch size {batch_size}, got {len(last_page_len)}")
        if len(indptr) != batch_size + 1:
            raise ValueError(f"indptr: expected {batch_size + 1} entries, got {len(indptr)}")
        if len(indices) > room:
            raise ValueError(f"indices: expected at most the buffer's {room} entries, got {len(indices)}")
        for name, array in given.items():
            getattr(self, name)[:len(array)].copy_(array, non_blocking=non_blocking)
