"""The kernels of a DecodeEngine and what they are given."""
from __future__ import annotations

from dataclasses import dataclass

from gpu import cache_scales
from gpu.config import KernelConfig
from gpu.kernels import load_kernel
from gpu.launch import Kernel

ARGUMENTS = "ppppppppppqqiiiiiiiiiff"  # pkv::DecodeArguments in cuda_src/attend.cuh, of 16-bit pages


def arguments(config: KernelConfig) -> str:
    """pkv::DecodeArguments of a variant, as gpu.launch writes a structure."""
    return f"[{ARGUMENTS}{'' if config.kv_dtype is None else cache_scales.SIGNATURE}]"


@dataclass(frozen=True, slots=True)
class DecodeKernels:
    """decode: balanced.cu or decode.cu; merge: merge.cu after decode.cu, None for balanced."""

    decode: Kernel
    merge: Kernel | None


def load_decode(config: KernelConfig, *, balanced: bool, overlap: bool) -> DecodeKernels:
    """Compiles and loads a variant on the current GPU. overlap: programmatic dependent launch (sm_90 and newer)."""
    defines, threads, given = config.defines(), config.threads, arguments(config)
    if balanced:
        return DecodeKernels(load_kernel("balanced.cu", "pkv_decode_balanced", given + "iiii", defines, threads=threads,
                                         shared_bytes=config.shared_bytes, overlap=overlap), None)
    return DecodeKernels(
        load_kernel("decode.cu", "pkv_decode_tasks", given + "ppii", defines, threads=threads,
                    shared_bytes=config.shared_bytes, overlap=overlap),
        load_kernel("merge.cu", "pkv_merge", "ppppppp", defines, threads=threads, overlap=overlap))
