"""vLLM's attention backend CUSTOM: rows that decode run on our balanced kernel, rows that prefill as they would have.

Written for vLLM 0.24. 16-bit caches build on vLLM's FlashAttention backend, 8-bit ones on its Triton backend, which
takes 16-bit queries: those store new keys and values and prefill. A step's decode rows come first (vLLM sorts them by
reorder_batch_threshold); their lengths and block table stay where vLLM keeps them, so that nothing is copied, planned
on the host or waited for, and a captured graph follows them. What our kernels do not serve decodes on the base
backend; one log line says so and why.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from gpu.drop_ins.vllm_step import (
    ENGINES,
    KV_TYPES,
    DecodeRows,
    Engines,
    LayerKind,
    count_decode_rows,
    most_query_tokens,
    own_planes,
    unserved,
)
from pkvsim import DecodeShape

LOG = init_logger("vllm.persistentkv")  # vLLM shows the loggers below its own name


@dataclass(slots=True, eq=False)
class StepMetadata:
    """What forward() needs of a step: the rows that decode here, and the base backend's metadata of the others."""

    num_actual_tokens: int
    slot_mapping: torch.Tensor  # [num_tokens] int64
    decode: DecodeRows | None
    base: Any | None  # None where no row prefills
    causal: bool | torch.Tensor = True


def is_eight_bit(kv_cache_dtype: str) -> bool:
    return KV_TYPES.get(kv_cache_dtype, (None, None))[0] is not None


def _eight_bit_cache() -> bool:
    return is_eight_bit(get_current_vllm_config().cache_config.cache_dtype)


class _Builder:
    """build() of either base: it cuts the step, and has the base build the metadata of the rows that prefill."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    reorder_batch_threshold: int | None = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig,
                 device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.reorder_batch_threshold = most_query_tokens(self.reorder_batch_threshold)
        layers = vllm_config.compilation_config.static_forward_context
        impls = [layers[name].impl for name in layer_names if name in layers]
        tokens = max(vllm_config.scheduler_config.max_num_seqs,
                     vllm_config.compilation_config.max_cudagraph_capture_size or 0) * self.reorder_batch_threshold
        ready = [impl.prepare_decode(kv_cache_spec.block_size, vllm_config.model_config.dtype, tokens, device,
                                     {1, self.reorder_batch_threshold}) for impl in impls]
        self._decodes = bool(ready) and all(ready)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata,
              fast_build: bool = False) -> StepMetadata:
        common = common_attn_metadata
        rows, query_tokens = 0, 1
        if self._decodes and common.causal is True and not common.mm_req_doc_ranges:
            rows, query_tokens = count_decode_rows(common.query_start_loc_cpu, self.reorder_batch_threshold)
        decode = None
        if rows:
            decode = DecodeRows(common.seq_lens[:rows], common.block_table_tensor[:rows], rows, query_tokens)
        base = None
        if rows < common.num_reqs:
            base = super().build(0, common if not rows else _without_first(common, decode), fast_build)
        return StepMetadata(common.num_actual_tokens, common.slot_mapping, decode, base, common.causal)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> StepMetadata:
        metadata = self.build(0, common_attn_metadata)
        if metadata.base is None:
            # The lengths of a capture are the model's longest; the runs that warm up would read all of them.
            metadata.decode.seq_lens.fill_(metadata.decode.query_tokens)
        return metadata

    def update_block_table(self, metadata: StepMetadata, blk_table: torch.Tensor,
                           slot_mapping: torch.Tensor) -> StepMetadata:
        decode, base, rows = metadata.decode, metadata.base, 0
        if decode is not None:
            rows = decode.num_rows
            decode = DecodeRows(decode.seq_lens, blk_table[:rows], rows, decode.query_tokens)
        if base is not None:
            first = 0 if decode is None else decode.num_tokens
            base = super().update_block_table(base, blk_table[rows:], slot_mapping[first:])
        return StepMetadata(metadata.num_actual_tokens, slot_mapping, decode, base, metadata.causal)

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        return False


def _without_first(common: CommonAttentionMetadata, decode: DecodeRows) -> CommonAttentionMetadata:
    """The step without its first rows, which decode."""
    rows, tokens = decode.num_rows, decode.num_tokens

    def tail(array: Any) -> Any:
        return None if array is None else array[rows:]

    return common.replace(
        query_start_loc=common.query_start_loc[rows:] - tokens,
        query_start_loc_cpu=common.query_start_loc_cpu[rows:] - tokens,
        seq_lens=tail(common.seq_lens), num_reqs=common.num_reqs - rows,
        num_actual_tokens=common.num_actual_tokens - tokens, block_table_tensor=tail(common.block_table_tensor),
        slot_mapping=common.slot_mapping[tokens:], is_prefilling=tail(common.is_prefilling),
        positions=None if common.positions is None else common.positions[tokens:],
        seq_lens_cpu_upper_bound=tail(common.seq_lens_cpu_upper_bound), _seq_lens_cpu=tail(common._seq_lens_cpu),
        _num_computed_tokens_cpu=tail(common._num_computed_tokens_cpu), _num_computed_tokens_cache=None,
        logits_indices_padded=None, num_logits_indices=None)


class FlashBuilder(_Builder, FlashAttentionMetadataBuilder):
    """Of 16-bit caches."""


class TritonBuilder(_Builder, TritonAttentionMetadataBuilder):
    """Of 8-bit caches."""

    supports_update_block_table = False


class _Impl:
    """forward() of either base: decode rows by our engine, then the base on what is left."""

    _kind: LayerKind | None = None
    _engines: Engines | None = None
    _lse: torch.Tensor | None = None
    _slots: dict

    def prepare_decode(self, block_size: int, dtype: torch.dtype, most_tokens: int, device: torch.device,
                       query_tokens: set[int]) -> bool:
        """Compiles the engines of this layer's kind, before any capture; False, said once, where none serves it."""
        reason = unserved(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
                          alibi=self.alibi_slopes is not None, attention_type=str(getattr(self.attn_type, "value",
                                                                                          self.attn_type)),
                          kv_cache_dtype=self.kv_cache_dtype, context_ranks=getattr(self, "dcp_world_size", 1))
        if reason is None:
            try:
                self._make_engines(block_size, dtype, most_tokens, device, query_tokens)
                return True
            except ValueError as error:
                reason = str(error)
        LOG.warning_once("PersistentKV does not serve this model's decode steps (%s): they run on %s", reason,
                         type(self).__mro__[2].__name__)
        return False

    def _make_engines(self, block_size: int, dtype: torch.dtype, most_tokens: int, device: torch.device,
                      query_tokens: set[int]) -> None:
        left, _ = self.sliding_window
        kv_dtype, kv_scales = KV_TYPES[self.kv_cache_dtype]
        kind = LayerKind(DecodeShape(self.num_heads, self.num_kv_heads, self.head_size, block_size),
                         str(dtype).removeprefix("torch."), None if left < 0 else left + 1,
                         self.logits_soft_cap or None, self.sinks is not None, kv_dtype, kv_scales, self.scale)
        engines = ENGINES.setdefault(device.index or 0, Engines())
        new = [tokens for tokens in sorted(query_tokens) if (kind, tokens) not in engines.made]
        self._kind, self._engines = kind, engines
        self._slots = {tokens: engines.of(kind, tokens) for tokens in query_tokens}
        self._lse = torch.empty(most_tokens, self.num_heads, dtype=torch.float32, device=device)
        for tokens in new:
            self._try_out(tokens, dtype, device)
        if new:
            LOG.info_once("PersistentKV decodes %s heads of %s over %s KV heads, pages of %s tokens, KV %s",
                          self.num_heads, self.head_size, self.num_kv_heads, block_size, self.kv_cache_dtype)

    def _try_out(self, query_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """One run over an empty row: the engine compiles, and knows from whose library arrays come."""
        shape, value = self._kind.shape, self._kind.kv_dtype
        stored = {None: dtype, "int8": torch.int8}.get(value, torch.uint8)
        pages = torch.zeros(1, shape.page_size, shape.num_kv_heads, shape.head_dim, dtype=stored, device=device)
        scales = torch.ones(pages.shape[:-1], device=device) if self._kind.kv_scales == "token" else None
        q = torch.zeros(query_tokens, self.num_heads, shape.head_dim, dtype=dtype, device=device)
        rows = DecodeRows(torch.zeros(1, dtype=torch.int32, device=device),
                          torch.zeros(1, 1, dtype=torch.int32, device=device), 1, query_tokens)
        self._decode(rows, q, pages, pages, torch.empty_like(q), scales, scales)
        torch.cuda.synchronize(device)
        self._slots[query_tokens].rows = None

    def _decode(self, rows: DecodeRows, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
                out: torch.Tensor, k_scale: object, v_scale: object) -> None:
        """q, out: [num_tokens, num_heads, head_size]; pages [num_blocks, block_size, num_kv_heads, head_size]."""
        slot = self._slots[rows.query_tokens]
        if slot.rows is not rows:
            slot.engine.plan(rows.seq_lens, rows.block_table)
            slot.rows = rows
        lse = self._lse[: rows.num_tokens]
        if rows.query_tokens > 1:
            grouped = rows.num_rows, rows.query_tokens
            q, out, lse = (array.view(*grouped, *array.shape[1:]) for array in (q, out, lse))
        slot.engine.run(q, k_pages, v_pages, out=out, lse=lse, sinks=self.sinks, k_scale=k_scale, v_scale=v_scale)

    def forward(self, layer: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                kv_cache: torch.Tensor, attn_metadata: StepMetadata | None, output: torch.Tensor,
                output_scale: torch.Tensor | None = None,
                output_block_scale: torch.Tensor | None = None) -> torch.Tensor:
        if attn_metadata is None:
            return output.fill_(0)  # vLLM's profiling run
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("output_scale: expected None, as outputs are 16-bit")
        done, rows = 0, attn_metadata.decode
        cache = self._view_of(kv_cache)
        if rows is not None:
            done = rows.num_tokens
            k_pages, v_pages = cache.unbind(1)
            self._decode(rows, query[:done], k_pages, v_pages, output[:done], *self._scales(layer))
        if attn_metadata.base is not None:
            super().forward(layer, query[done:], key[done:], value[done:], cache, attn_metadata.base, output[done:])
        return output

    def _view_of(self, kv_cache: torch.Tensor) -> torch.Tensor:
        return kv_cache

    def _scales(self, layer: torch.nn.Module) -> tuple[object, object]:
        return None, None


class FlashImpl(_Impl, FlashAttentionImpl):
    """Of 16-bit caches."""


class TritonImpl(_Impl, TritonAttentionImpl):
    """Of 8-bit caches, with one scale of all K and of all V, or one of each token and head."""

    _seen: int = 0  # address of the cache that the views below are of
    _values: torch.Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.supports_quant_query_input = False  # our kernel takes 16-bit queries, and this base does as well

    def _view_of(self, kv_cache: torch.Tensor) -> torch.Tensor:
        if not self._is_per_token_head_quant:
            return kv_cache
        if kv_cache.data_ptr() != self._seen:
            self._values, self._k_scale_cache, self._v_scale_cache = own_planes(kv_cache, self.head_size)
            self._k_scale_cache.fill_(1.0)
            self._v_scale_cache.fill_(1.0)
            self._seen = kv_cache.data_ptr()
        return self._values

    def _ensure_scale_caches(self, kv_cache: torch.Tensor) -> None:
        """The base would take the scales from between the values; _view_of has them from planes of their own."""

    def do_kv_cache_update(self, layer: torch.nn.Module, key: torch.Tensor, value: torch.Tensor,
                           kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        super().do_kv_cache_update(layer, key, value, self._view_of(kv_cache), slot_mapping)

    def _scales(self, layer: torch.nn.Module) -> tuple[object, object]:
        if self._is_per_token_head_quant:
            return self._k_scale_cache, self._v_scale_cache
        return layer._k_scale, layer._v_scale


class PersistentBackend(FlashAttentionBackend):
    """The class that vLLM asks what is served; it says what either base does."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = list(KV_TYPES)

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        return TritonImpl if _eight_bit_cache() else FlashImpl

    @staticmethod
    def get_builder_cls() -> type:
        return TritonBuilder if _eight_bit_cache() else FlashBuilder

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int,
                           cache_dtype_str: str = "auto") -> tuple[int, ...]:
        base: type[AttentionBackend] = TritonAttentionBackend if is_eight_bit(cache_dtype_str) else FlashAttentionBackend
        return base.get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype is None or kv_cache_dtype in KV_TYPES

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False  # where rows are cut depends on the other rows

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == "decoder"
