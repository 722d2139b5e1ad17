"""The decode kernels of one engine, one for each layout of tables that its steps come with."""
from __future__ import annotations

from typing import TYPE_CHECKING

from gpu.engine import cache_scales
from gpu.inputs.block_tables import TableLayout
from gpu.kernels.compile import load_kernel
from gpu.kernels.variant import KernelConfig

if TYPE_CHECKING:
    from gpu.kernels.launch import Kernel

ARGUMENTS = "ppppppppppqqiiiiiiiiiff"  # pkv::DecodeArguments in cuda_src/attend.cuh, of 16-bit pages and block tables


def arguments(config: KernelConfig, layout: TableLayout) -> str:
    """pkv::DecodeArguments of a variant, as gpu.kernels.launch writes a structure."""
    scales = "" if config.kv_dtype is None else cache_scales.SIGNATURE
    return f"[{ARGUMENTS}{scales}{'p' if layout.csr else ''}]"


class DecodeKernels:
    """Compiled when they are first asked for."""

    __slots__ = ("_config", "_planned_on_gpu", "_overlap", "_decode", "_merge")

    def __init__(self, config: KernelConfig, *, planned_on_gpu: bool, overlap: bool) -> None:
        """planned_on_gpu: the balanced schedule. overlap: see gpu.kernels.compile.load_kernel."""
        self._config, self._planned_on_gpu, self._overlap = config, planned_on_gpu, overlap
        self._decode: dict[TableLayout, Kernel] = {}
        self._merge: Kernel | None = None

    def decode(self, layout: TableLayout) -> Kernel:
        if layout not in self._decode:
            file, name, own = ("balanced.cu", "pkv_decode_balanced", "iiiii") if self._planned_on_gpu else (
                "decode.cu", "pkv_decode_tasks", "ppii")
            self._decode[layout] = load_kernel(
                file, name, arguments(self._config, layout) + own, self._config.defines() | layout.defines(),
                threads=self._config.threads, shared_bytes=self._config.shared_bytes, overlap=self._overlap,
                pairs=self._planned_on_gpu)
        return self._decode[layout]

    def merge(self) -> Kernel:
        if self._merge is None:
            self._merge = load_kernel("merge.cu", "pkv_merge", "ppppppp", self._config.defines(),
                                      threads=self._config.threads, overlap=self._overlap)
        return self._merge
