"""FlashInfer's decode backends behind DecodeEngine's plan() and run().

Each is driven at its best: indptr on the host, HND pages, a zeroed workspace, no CUDA-graph padding
(a planned run() can be captured as it is; a new plan needs a new capture).
"""
from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass

import numpy as np

from gpu.inputs.arrays import to_host
from pkvsim import DecodeShape
from pkvsim.devices.route_options import CUDA_CORE_GROUPS, XQA_PAGE_SIZES
from pkvsim.devices.route_options import FLASHINFER_HEAD_DIMS as HEAD_DIMS
from pkvsim.options import PLAIN, AttentionOptions

BACKENDS = ("cuda_core", "tensor_core", "xqa", "batch_attention")
WORKSPACE_BYTES = 384 << 20
FP8_CACHES = {  # by one scale each of K and V; BatchAttention is driven on 16-bit pages only
    "cuda_core": ("float8_e4m3fn", "float8_e5m2"),
    "tensor_core": ("float8_e4m3fn", "float8_e5m2"),
    "xqa": ("float8_e4m3fn",),
}


def installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def supports(shape: DecodeShape, backend: str, options: AttentionOptions = PLAIN) -> str | None:
    """None when the backend can run the shape over the options' cache, else the reason why not."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if shape.head_dim not in HEAD_DIMS:
        return f"head_dim {shape.head_dim} is not one of {HEAD_DIMS}"
    if backend == "cuda_core" and shape.group_size not in CUDA_CORE_GROUPS:
        return f"group size {shape.group_size} is not one of {CUDA_CORE_GROUPS}"
    if backend == "xqa" and shape.page_size not in XQA_PAGE_SIZES:
        return f"page size {shape.page_size} is not one of {XQA_PAGE_SIZES}"
    if options.kv_dtype is not None and options.kv_dtype not in FP8_CACHES.get(backend, ()):
        return f"it takes no {options.kv_dtype} pages"
    if options.kv_scales not in (None, "tensor"):
        return f"it takes one scale each of K and V, not one of every {options.kv_scales}"
    return None


def as_torch(array):
    """The same memory as a torch tensor."""
    import torch

    return array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)


@dataclass(frozen=True, slots=True)
class PackedTable:
    """A block table as FlashInfer wants it."""

    indptr: object  # [batch_size + 1] int32, host
    indices: object  # [sum of pages] int32, device
    last_page_len: object  # [batch_size] int32, host
    seq_lens_host: object  # [batch_size] int32, host
    seq_lens: object  # [batch_size] int32, device
    block_table: object  # [batch_size, max_pages] int32, device


def pack_table(seq_lens, block_table, *, page_size: int, device: str = "cuda") -> PackedTable:
    """CSR form of seq_lens [batch_size] and block_table [batch_size, max_pages]."""
    import torch

    lens = to_host("seq_lens", seq_lens).astype(np.int32)
    table = to_host("block_table", block_table).astype(np.int32)
    pages = -(-lens // page_size)
    owned = np.arange(table.shape[1])[None, :] < pages[:, None]
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    last = np.where(lens > 0, (lens - 1) % page_size + 1, 0).astype(np.int32)
    return PackedTable(indptr=torch.from_numpy(indptr), indices=torch.from_numpy(table[owned]).to(device),
                       last_page_len=torch.from_numpy(last), seq_lens_host=torch.from_numpy(lens),
                       seq_lens=torch.from_numpy(lens).to(device), block_table=torch.from_numpy(table).to(device))


class FlashInferDecode:
    """One FlashInfer backend for one shape: plan() a step, run() it for every layer."""

    __slots__ = ("shape", "backend", "options", "_dtype", "_kv_dtype", "_workspace", "_wrapper", "_packed")

    def __init__(self, shape: DecodeShape, dtype: str = "float16", backend: str = "tensor_core",
                 options: AttentionOptions = PLAIN) -> None:
        """options: such as the backend serves (route_engines.missing_routes), and FP8 pages as supports() tells."""
        import torch

        reason = supports(shape, backend, options)
        if reason is not None:
            raise ValueError(f"shape: FlashInfer {backend} cannot run it: {reason}")
        if dtype not in ("float16", "bfloat16"):
            raise ValueError(f"dtype: expected float16 or bfloat16, got {dtype!r}")
        self.shape = shape
        self.backend = backend
        self.options = options
        self._dtype = getattr(torch, dtype)
        self._kv_dtype = getattr(torch, options.kv_dtype or dtype)
        self._packed: PackedTable | None = None
        # XQA keeps its semaphores here and resets them itself: they must start at zero.
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        self._wrapper = self._make_wrapper()

    def _make_wrapper(self):
        import flashinfer

        if self.backend == "xqa":
            return None
        if self.backend == "batch_attention":
            return flashinfer.BatchAttention(kv_layout="HND", device="cuda")
        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "HND",
                                                             use_tensor_cores=self.backend == "tensor_core")

    def plan(self, seq_lens, block_table) -> None:
        """seq_lens [batch_size] int32, block_table [batch_size, max_pages] int32: NumPy, CuPy or torch."""
        self.plan_packed(pack_table(seq_lens, block_table, page_size=self.shape.page_size))

    def plan_packed(self, packed: PackedTable) -> None:
        """FlashInfer's own planning alone, on a table already in its form."""
        import torch

        shape = self.shape
        self._packed = packed
        if self.backend == "batch_attention":
            batch_size = len(packed.last_page_len)
            self._wrapper.plan(torch.arange(batch_size + 1, dtype=torch.int32), packed.indptr, packed.indices,
                               packed.seq_lens_host, shape.num_q_heads, shape.num_kv_heads, shape.head_dim,
                               shape.head_dim, shape.page_size, causal=False, q_data_type=self._dtype,
                               kv_data_type=self._kv_dtype)
        elif self._wrapper is not None:
            self._wrapper.plan(packed.indptr, packed.indices, packed.last_page_len, shape.num_q_heads,
                               shape.num_kv_heads, shape.head_dim, shape.page_size, q_data_type=self._dtype,
                               kv_data_type=self._kv_dtype, window_left=self._window_left,
                               logits_soft_cap=self.options.soft_cap, q_len_per_req=self.options.query_tokens)

    @property
    def _window_left(self) -> int:
        """Tokens before a query token that it sees; FlashInfer does not count the token itself."""
        return -1 if self.options.window is None else self.options.window - 1

    def run(self, q, k_pages, v_pages, out=None, *, return_lse: bool = True, sinks=None, k_scale: float = 1.0,
            v_scale: float = 1.0):
        """q [batch_size, num_q_heads, head_dim] -> (out alike, lse [batch_size, num_q_heads] or None).

        Of several query tokens q, out and lse have an axis [batch_size, query_tokens, ..]. sinks [num_q_heads] float32.
        FP8 pages are of that type or its codes as uint8; a stored k stands for k * k_scale. Where v_scale is not 1, the
        wrapper of the CUDA and tensor cores multiplies its outputs by it in a further kernel.
        """
        import torch

        if self._packed is None:
            raise ValueError("run: expected plan() first")
        q, k_pages, v_pages = as_torch(q), as_torch(k_pages), as_torch(v_pages)
        if self.options.kv_dtype is not None:
            k_pages, v_pages = k_pages.view(self._kv_dtype), v_pages.view(self._kv_dtype)
        out = torch.empty_like(q) if out is None else as_torch(out)
        rows = q.shape[:-1]
        q, given = q.flatten(0, -3), out
        out = out.view(q.shape)  # FlashInfer has the rows' query tokens end to end
        if self.backend == "xqa":
            self._run_xqa(q, k_pages, v_pages, out, None if sinks is None else as_torch(sinks), k_scale, v_scale)
            return given, None
        if self.backend == "batch_attention":
            _, lse = self._wrapper.run(q, (k_pages, v_pages), out=out, k_scale=k_scale, v_scale=v_scale)
        elif return_lse:
            _, lse = self._wrapper.run(q, (k_pages, v_pages), out=out, return_lse=True, k_scale=k_scale,
                                       v_scale=v_scale)
        else:
            self._wrapper.run(q, (k_pages, v_pages), out=out, k_scale=k_scale, v_scale=v_scale)
            return given, None
        # FlashInfer's LSE has base 2.
        return given, (lse * math.log(2.0)).view(rows) if return_lse else None

    def _run_xqa(self, q, k_pages, v_pages, out, sinks, k_scale, v_scale) -> None:
        from flashinfer.decode import xqa_batch_decode_with_kv_cache

        packed = self._packed
        max_seq_len = packed.block_table.shape[1] * self.shape.page_size
        xqa_batch_decode_with_kv_cache(q, (k_pages, v_pages), self._workspace, packed.block_table, packed.seq_lens,
                                       max_seq_len, bmm1_scale=k_scale / math.sqrt(self.shape.head_dim),
                                       bmm2_scale=v_scale, window_left=self._window_left, out=out, sinks=sinks,
                                       kv_layout="HND")
