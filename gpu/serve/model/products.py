"""Matrix products of a layer, with what stands beside them: a norm before, a sum or SiLU's gate behind.

PyTorch's serve any number of rows. A product of few rows costs as long as its weights take to stream, which
cuda_src/product.cu does with norm and sum included, from before the previous kernel has ended.
"""
from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import linear, rms_norm, silu

from gpu.kernels.compile import load_kernel
from gpu.kernels.launch import Kernel
from gpu.kernels.this_gpu import this_gpu
from gpu.kernels.variant import shared_limit_bytes
from gpu.serve.model.product_variant import ADD, GATE, STORE, TILE_ROWS, WARPS, ProductVariant, variant
from gpu.serve.model.row_kernels import RowKernels


class Products(Protocol):
    """x [n, h] are hidden states, norm [h], weight [rows, h or the width of what is given], bias [rows] or None."""

    def normed(self, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor,
               bias: torch.Tensor | None) -> torch.Tensor:
        """weight @ rms_norm(x) + bias, [n, rows]."""

    def gated(self, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor,
              bias: torch.Tensor | None) -> torch.Tensor:
        """silu(gate) * up of the two halves of normed(x), [n, rows / 2]."""

    def add(self, x: torch.Tensor, given: torch.Tensor, weight: torch.Tensor,
            bias: torch.Tensor | None) -> torch.Tensor:
        """x += weight @ given + bias, in place; returns x. given [n, columns of weight]."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """The first index of each row's largest value, [n] int64, of logits [n, vocab_size]."""


class TorchProducts:
    """PyTorch's."""

    __slots__ = ("eps",)

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def normed(self, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor,
               bias: torch.Tensor | None) -> torch.Tensor:
        return linear(rms_norm(x, x.shape[1:], norm, self.eps), weight, bias)

    def gated(self, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor,
              bias: torch.Tensor | None) -> torch.Tensor:
        gate, up = self.normed(x, norm, weight, bias).chunk(2, dim=1)
        return silu(gate) * up

    def add(self, x: torch.Tensor, given: torch.Tensor, weight: torch.Tensor,
            bias: torch.Tensor | None) -> torch.Tensor:
        x.addmm_(given, weight.t())  # the product and the sum in one kernel
        return x if bias is None else x.add_(bias)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)


class RowProducts(TorchProducts):
    """PyTorch's products; norms, gates and the choice of tokens in one launch each."""

    __slots__ = ("_rows",)

    def __init__(self, eps: float, rows: RowKernels) -> None:
        super().__init__(eps)
        self._rows = rows

    def normed(self, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor,
               bias: torch.Tensor | None) -> torch.Tensor:
        if not self._rows.serves(x, x.shape[1]):
            return super().normed(x, norm, weight, bias)
        return linear(self._rows.rms_norm(x, norm, self.eps), weight, bias)

    def gated(self, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor,
              bias: torch.Tensor | None) -> torch.Tensor:
        if not self._rows.serves(x, len(weight) // 2):
            return super().gated(x, norm, weight, bias)
        return self._rows.gate(self.normed(x, norm, weight, bias))

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return self._rows.argmax(logits)


class StreamedProducts:
    """The kernel's where it serves a product, RowProducts' otherwise. A capture's products must have run before it."""

    __slots__ = ("_torch", "_eps", "_gpu", "_kernels")

    def __init__(self, eps: float) -> None:
        self._torch, self._eps, self._gpu = RowProducts(eps, RowKernels()), eps, this_gpu()
        self._kernels: dict[ProductVariant, Kernel] = {}

    def normed(self, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor,
               bias: torch.Tensor | None) -> torch.Tensor:
        kernel = self._kernel(x, weight, True, STORE)
        if kernel is None:
            return self._torch.normed(x, norm, weight, bias)
        return self._run(kernel, x, weight, norm, bias, x.new_empty((len(x), len(weight))))

    def gated(self, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor,
              bias: torch.Tensor | None) -> torch.Tensor:
        kernel = self._kernel(x, weight, True, GATE)
        if kernel is None:
            return self._torch.gated(x, norm, weight, bias)
        return self._run(kernel, x, weight, norm, bias, x.new_empty((len(x), len(weight) // 2)))

    def add(self, x: torch.Tensor, given: torch.Tensor, weight: torch.Tensor,
            bias: torch.Tensor | None) -> torch.Tensor:
        kernel = self._kernel(given, weight, False, ADD)
        if kernel is None:
            return self._torch.add(x, given, weight, bias)
        return self._run(kernel, given, weight, None, bias, x)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return self._torch.argmax(logits)

    def _kernel(self, x: torch.Tensor, weight: torch.Tensor, normed: bool, end: int) -> Kernel | None:
        found = variant(rows=len(weight), depth=weight.shape[1], columns=len(x), normed=normed, end=end,
                        bfloat16=x.dtype == torch.bfloat16,
                        shared_limit=shared_limit_bytes(self._gpu.compute_capability))
        if found is not None and found not in self._kernels:
            self._kernels[found] = load_kernel(
                "product.cu", "pkv_product", found.defines(), threads=WARPS * 32, shared_bytes=found.shared_bytes(),
                overlap=self._gpu.overlaps)  # fmt: skip
        return None if found is None else self._kernels[found]

    def _run(self, kernel: Kernel, x: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor | None,
             bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (x, weight, norm, bias, out)]
        numbers = len(x), len(weight), x.stride(0), out.stride(0)
        grid = min(self._gpu.num_sms, len(weight) // TILE_ROWS)
        kernel(grid, (*pointers, *numbers, self._eps), torch._C._cuda_getCurrentRawStream(x.device.index))
        return out
