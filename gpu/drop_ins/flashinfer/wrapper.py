"""FlashInfer's BatchDecodeWithPagedKVCacheWrapper over DecodeEngine: a script changes its import and nothing else.

Arguments, order, defaults and return values are those of FlashInfer 0.7.2. What gpu.drop_ins.refusals lists raises
NotImplementedError naming the argument. Where it differs, on purpose: the workspace is not used, and plan() never
waits for the GPU.
"""
from __future__ import annotations

import functools
import math

import torch

from gpu.drop_ins.flashinfer.arguments import (
    check_number,
    check_numbers,
    check_tensor,
    check_tokens,
    dtype_of,
    name_of,
    pages_of,
)
from gpu.drop_ins.flashinfer.buffers import CsrBuffers
from gpu.drop_ins.refusals import check_served
from pkvsim import DecodeShape
from pkvsim.options import AttentionOptions

LOG2_E = math.log2(math.e)
POS_ENCODING_MODES = ("NONE", "ROPE_LLAMA", "ALIBI")


class BatchDecodeWithPagedKVCacheWrapper:
    """Decode attention of a batch over a paged KV cache: plan() a step, run() it for every layer.

    plan() and run() belong on one stream. With use_cuda_graph plan() copies the page tables into the caller's buffers,
    so a captured run() follows later plans of the same batch size.
    """

    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        use_tensor_cores: bool = False, paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None, backend: str = "auto",
        jit_args: list | None = None,
    ) -> None:
        """
        float_workspace_buffer: only its device is used. use_tensor_cores: the engine has one kernel, which uses them.
        paged_kv_*_buffer: with use_cuda_graph, int32 [batch_size + 1], [most indices], [batch_size].

        Raises KeyError for an unknown kv_layout, ValueError for graph buffers that are missing or do not fit,
        NotImplementedError for what is not served.
        """
        check_tensor("float_workspace_buffer", float_workspace_buffer)
        if kv_layout not in ("NHD", "HND"):
            raise KeyError(f"kv_layout: expected NHD or HND, got {kv_layout!r}")
        check_served("backend", backend)
        check_served("jit_args", jit_args)
        buffers = {"paged_kv_indptr_buffer": paged_kv_indptr_buffer,
                   "paged_kv_indices_buffer": paged_kv_indices_buffer,
                   "paged_kv_last_page_len_buffer": paged_kv_last_page_len_buffer}
        if use_cuda_graph:
            for name, buffer in buffers.items():
                if not isinstance(buffer, torch.Tensor):
                    raise ValueError(f"{name}: expected a torch.Tensor with use_cuda_graph, got {buffer!r}")
            batch_size = len(paged_kv_last_page_len_buffer)
            if len(paged_kv_indptr_buffer) != batch_size + 1:
                raise ValueError(f"paged_kv_indptr_buffer: expected batch_size + 1 = {batch_size + 1} entries, "
                                 f"got {len(paged_kv_indptr_buffer)}")
        self.device = float_workspace_buffer.device
        self._kv_layout, self._use_cuda_graph, self._use_tensor_cores = kv_layout, use_cuda_graph, use_tensor_cores
        self._tables = CsrBuffers(tuple(buffers.values()) if use_cuda_graph else None)
        self._shape: DecodeShape | None = None
        self._dtype: torch.dtype | None = None
        self._kv_dtype: str | None = None  # of FP8 pages
        self._sm_scale: float | None = None
        self._window_left = -1
        self._logits_soft_cap: float | None = None
        self._q_len: int | None = None
        self._engines: dict[AttentionOptions, object] = {}  # all of the planned shape and dtype
        self._planned: set[AttentionOptions] = set()  # those whose engine knows the last plan

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Only checks the device, as the workspaces are not used. Raises ValueError naming the argument."""
        for name, buffer in (("float_workspace_buffer", float_workspace_buffer),
                             ("int_workspace_buffer", int_workspace_buffer)):
            if buffer.device != self.device:
                raise ValueError(f"{name}: expected a buffer on {self.device}, got one on {buffer.device}")

    def plan(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, page_size: int, pos_encoding_mode: str = "NONE", window_left: int = -1,
        logits_soft_cap: float | None = None, q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None, o_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None, sm_scale: float | None = None, rope_scale: float | None = None,
        rope_theta: float | None = None, non_blocking: bool = True, block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None, fixed_split_size: int | None = None, disable_split_kv: bool = False,
        q_len_per_req: int = 1, *, window_right: int = 0, is_causal: bool | None = None,
    ) -> None:
        """Prepares a step.

        indptr [batch_size + 1], indices [indptr[-1]], last_page_len [batch_size]: int32, indices int64 too, each on the
        host or the GPU. rope_scale, rope_theta, block_tables, seq_lens: not needed.

        Raises ValueError, NotImplementedError or KeyError naming the argument.
        """
        if pos_encoding_mode not in POS_ENCODING_MODES:
            raise KeyError(f"pos_encoding_mode: expected one of {POS_ENCODING_MODES}, got {pos_encoding_mode!r}")
        check_number("q_len_per_req", q_len_per_req, whole=True, or_none=False)
        check_numbers(window_left, logits_soft_cap, sm_scale)
        q_dtype = dtype_of(q_data_type if q_data_type is not None else data_type)
        kv_dtype = dtype_of(next((given for given in (kv_data_type, data_type) if given is not None), q_dtype))
        for name, value in (("pos_encoding_mode", pos_encoding_mode), ("q_data_type", name_of(q_dtype)),
                            ("kv_data_type", name_of(kv_dtype)), ("fixed_split_size", fixed_split_size),
                            ("disable_split_kv", disable_split_kv), ("q_len_per_req", q_len_per_req),
                            ("window_right", window_right)):
            check_served(name, value)
        self._check_q_len(q_len_per_req, is_causal)
        o_dtype = q_dtype if o_data_type is None else dtype_of(o_data_type)
        fp8 = kv_dtype.itemsize == 1
        for name, given in (("kv_data_type", q_dtype if fp8 else kv_dtype), ("o_data_type", o_dtype)):
            if given != q_dtype:
                raise NotImplementedError(f"{name}: expected q_data_type {name_of(q_dtype)}, got {name_of(given)}")
        shape = DecodeShape(num_qo_heads, num_kv_heads, head_dim, page_size)
        self._tables.update(indptr, indices, last_page_len, device=self.device, non_blocking=non_blocking)
        if (shape, q_dtype) != (self._shape, self._dtype):
            self._shape, self._dtype, self._engines = shape, q_dtype, {}
        self._kv_dtype = name_of(kv_dtype) if fp8 else None
        self._sm_scale, self._window_left, self._logits_soft_cap = sm_scale, window_left, logits_soft_cap
        self._q_len = q_len_per_req
        self._planned.clear()
        self._engine(sinks=False)

    begin_forward = plan

    def end_forward(self) -> None:
        """Nothing to do; kept for scripts that call it."""

    def run(
        self, q: torch.Tensor, paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor], *args: object,
        q_scale: float | None = None, k_scale: float | None = None, v_scale: float | torch.Tensor | None = None,
        out: torch.Tensor | None = None, lse: torch.Tensor | None = None, return_lse: bool = False,
        enable_pdl: bool | None = None, window_left: int | None = None, sinks: torch.Tensor | None = None,
        q_len_per_req: int | None = None, skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: object = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned step: out, or (out, lse) with return_lse.

        q [batch_size * q_len_per_req, num_qo_heads, head_dim]. paged_kv_cache: a pair of pools [num_pages,
        num_kv_heads, page_size, head_dim], with NHD [num_pages, page_size, num_kv_heads, head_dim], or both in one
        [num_pages, 2, ..]. out like q; lse [batch_size * q_len_per_req, num_qo_heads] float32 of base 2, written where
        it is given, as FlashInfer does, even if it is not returned. q_scale, k_scale multiply the logits, v_scale the
        output: of FP8 pages, what they were stored with. sinks [num_qo_heads] float32. enable_pdl: a hint, of no
        effect.

        Raises ValueError or NotImplementedError naming the argument, RuntimeError when nothing was planned.
        """
        if self._shape is None:
            raise RuntimeError("run: call plan() first")
        for name, value in (("run args", args), ("kv_cache_sf", kv_cache_sf),
                            ("skip_softmax_threshold_scale_factor", skip_softmax_threshold_scale_factor)):
            check_served(name, value)
        for name, given, planned in (("window_left", window_left, self._window_left),
                                     ("q_len_per_req", q_len_per_req, self._q_len)):
            if given is not None and given != planned:
                raise ValueError(f"{name}: expected plan()'s {planned}, got {given}")
        k_pages, v_pages = pages_of(paged_kv_cache, self._kv_layout)
        rows = len(self._tables.last_page_len), self._q_len
        check_tokens(q, out, lse, rows)
        if not isinstance(v_scale, torch.Tensor):
            check_number("v_scale", v_scale)
        kv_dtype = name_of(self._dtype) if self._kv_dtype is None else self._kv_dtype
        for name, array, wanted in (("q", q, name_of(self._dtype)), ("k", k_pages, kv_dtype), ("v", v_pages, kv_dtype)):
            if name_of(array.dtype) != wanted:
                raise ValueError(f"{name}: expected plan()'s {wanted}, got {name_of(array.dtype)}")
        one = rows[1] == 1  # else the engine has an axis of tokens
        by_row = (array if array is None or one else array.unflatten(0, rows) for array in (q, out, lse))
        engine_q, engine_out, engine_lse = by_row
        engine, scale = self._engine(sinks=sinks is not None), self._scale(q_scale, k_scale)
        more = {}
        if self._kv_dtype is not None and isinstance(v_scale, float) and v_scale > 0:
            more, v_scale = {"v_scale": v_scale}, None  # before the output is rounded
        found = engine.run(engine_q, k_pages, v_pages, out=engine_out, lse=engine_lse, scale=scale, sinks=sinks, **more)
        out, lse = (given if given is not None else new if one else new.flatten(0, 1)
                    for given, new in zip((out, lse), found))
        if v_scale is not None and not (isinstance(v_scale, float) and v_scale == 1.0):
            out.mul_(v_scale)
        if return_lse or engine_lse is not None:
            lse.mul_(LOG2_E)
        return (out, lse) if return_lse else out

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self, q: torch.Tensor, paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        pos_encoding_mode: str = "NONE", q_scale: float | None = None, k_scale: float | None = None,
        v_scale: float | torch.Tensor | None = None, window_left: int = -1, logits_soft_cap: float | None = None,
        sm_scale: float | None = None, rope_scale: float | None = None, rope_theta: float | None = None,
        *, return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """run() with what older scripts pass here instead of to plan(), the defaults included."""
        check_served("pos_encoding_mode", pos_encoding_mode)
        check_numbers(window_left, logits_soft_cap, sm_scale)
        self._sm_scale, self._window_left, self._logits_soft_cap = sm_scale, window_left, logits_soft_cap
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)

    def _scale(self, q_scale: float | None, k_scale: float | None) -> float:
        scale = self._shape.head_dim**-0.5 if self._sm_scale is None else self._sm_scale
        for name, factor in (("q_scale", q_scale), ("k_scale", k_scale)):
            if factor is None:
                continue
            if not isinstance(factor, (int, float)):
                raise NotImplementedError(f"{name}: expected a number on the host, got {type(factor).__name__}")
            check_number(name, factor)
            scale *= factor
        return float(scale)

    def _check_q_len(self, q_len_per_req: int, is_causal: bool | None) -> None:
        if q_len_per_req < 1:
            raise ValueError(f"q_len_per_req: expected at least 1, got {q_len_per_req}")
        if q_len_per_req > 1 and not self._use_tensor_cores:
            raise ValueError(f"q_len_per_req: expected 1 without use_tensor_cores, got {q_len_per_req}")
        if self._use_cuda_graph and self._q_len not in (None, q_len_per_req):
            raise ValueError(f"q_len_per_req: expected the first plan's {self._q_len}, got {q_len_per_req}")
        if is_causal not in (None, q_len_per_req > 1):
            raise NotImplementedError(f"is_causal: expected None or {q_len_per_req > 1} with {q_len_per_req} query "
                                      f"tokens per row, got {is_causal}")

    def _engine(self, *, sinks: bool) -> object:
        """The engine of the step's options, planned for the current step."""
        cap = self._logits_soft_cap
        options = AttentionOptions(window=None if self._window_left < 0 else self._window_left + 1, sinks=sinks,
                                   soft_cap=cap if cap is not None and cap > 0 else None, query_tokens=self._q_len,
                                   kv_dtype=self._kv_dtype)
        engine = self._engines.get(options)
        if engine is None:
            engine = self._engines[options] = self._make_engine(self._shape, name_of(self._dtype), options)
        if options not in self._planned:
            tables = self._tables
            engine.plan(indptr=tables.indptr, indices=tables.indices, last_page_len=tables.last_page_len)
            self._planned.add(options)
        return engine

    def _make_engine(self, shape: DecodeShape, dtype: str, options: AttentionOptions) -> object:
        from gpu.decode_engine import DecodeEngine

        return DecodeEngine(shape, dtype, "balanced", options=options)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """The same with use_cuda_graph, and its buffers first."""

    def __init__(self, workspace_buffer: torch.Tensor, indptr_buffer: torch.Tensor, indices_buffer: torch.Tensor,
                 last_page_len_buffer: torch.Tensor, kv_layout: str = "NHD", use_tensor_cores: bool = False) -> None:
        super().__init__(workspace_buffer, kv_layout, True, use_tensor_cores, indptr_buffer, indices_buffer,
                         last_page_len_buffer)
