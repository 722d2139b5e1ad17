"""cuda_src/rows.cu: norms, gates and the likeliest token of a step's rows, each in one launch."""
from __future__ import annotations

import torch

from gpu.kernels.compile import load_kernel
from gpu.kernels.launch import Kernel
from gpu.kernels.this_gpu import this_gpu

THREADS, VECTOR, CHOICE_WIDTH = 256, 8, 8192  # of cuda_src/rows.cu
MOST_NORM_VECTORS = 8
MOST_ROWS = 65535  # that the second dimension of a grid has


class RowKernels:
    """Calls allocate their output, launch and return; a capture's calls must have run before it.

    Tensors are [rows, width] of FP16 or BF16 with contiguous elements. ValueError where `serves` says no.
    """

    __slots__ = ("_gpu", "_kernels", "_choices")

    def __init__(self) -> None:
        self._gpu = this_gpu()
        self._kernels: dict[tuple[str, torch.dtype, int], Kernel] = {}
        self._choices: list[torch.Tensor] = []  # the last is the largest; graphs may hold the others

    def serves(self, x: torch.Tensor, width: int) -> bool:
        """Whether norms and gates of this width are computed here."""
        return (0 < len(x) <= MOST_ROWS and width % VECTOR == 0 and x.stride(0) % VECTOR == 0 and x.stride(1) == 1
                and x.data_ptr() % 16 == 0 and width <= THREADS * VECTOR * MOST_NORM_VECTORS
                and x.dtype in (torch.float16, torch.bfloat16))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) * weight, rounded once. weight [width]."""
        rows, width = x.shape
        self._check(x, width)
        out = x.new_empty((rows, width))
        kernel = self._kernel("pkv_rms_norm", x, -(-width // (THREADS * VECTOR)))
        kernel(rows, (x.data_ptr(), weight.data_ptr(), out.data_ptr(), width, x.stride(0), eps), _stream(x))
        return out

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """silu(left) * right of the halves of x, [rows, width / 2], rounded once."""
        rows, width = len(x), x.shape[1] // 2
        self._check(x, width)
        out = x.new_empty((rows, width))
        self._kernel("pkv_silu_gate", x)(
            (-(-width // (THREADS * VECTOR)), rows), (x.data_ptr(), out.data_ptr(), width, x.stride(0)), _stream(x)
        )
        return out

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        """The first index of each row's largest value, [rows] int64; a NaN is the largest. Any width."""
        rows, width = x.shape
        out = torch.empty(rows, dtype=torch.int64, device=x.device)
        if not self._choices or len(self._choices[-1]) < rows:
            self._choices.append(torch.zeros((rows, 2), dtype=torch.int64, device=x.device))
        pointers = x.data_ptr(), out.data_ptr(), self._choices[-1].data_ptr()
        self._kernel("pkv_argmax", x)((-(-width // CHOICE_WIDTH), rows), (*pointers, width, x.stride(0)), _stream(x))
        return out

    def _check(self, x: torch.Tensor, width: int) -> None:
        if not self.serves(x, width):
            raise ValueError(f"x: expected at most {MOST_ROWS} rows of a width of a multiple of {VECTOR} up to "
                             f"{THREADS * VECTOR * MOST_NORM_VECTORS}, 16-bit, got {tuple(x.shape)} {x.dtype}")

    def _kernel(self, name: str, x: torch.Tensor, vectors: int = 1) -> Kernel:
        key = name, x.dtype, vectors
        if key not in self._kernels:
            defines = {"NORM_VECTORS": vectors, "DTYPE_BF16": int(x.dtype == torch.bfloat16)}
            self._kernels[key] = load_kernel("rows.cu", name, defines, threads=THREADS, overlap=self._gpu.overlaps)
        return self._kernels[key]


def _stream(x: torch.Tensor) -> int:
    return torch._C._cuda_getCurrentRawStream(x.device.index)
