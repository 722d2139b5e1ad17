"""vLLM's attention backend CUSTOM: rows that decode run on our balanced kernel, rows that prefill as they would have.

Written for vLLM 0.24; backend_0_33 has what is other in 0.33. 16-bit caches build on vLLM's FlashAttention backend,
8-bit ones on its Triton backend, which takes 16-bit queries: those store new keys and values and prefill. Decode rows'
lengths and block table stay where vLLM keeps them, so that nothing is copied, planned on the host or waited for, and a
captured graph follows them. What our kernels do not serve decodes on the base backend, and one log line says so and
why.

vLLM wraps these classes for some models: chunked local attention, shared caches with fast prefill, encoders and cross
attention subclass the builder, and give metadata further attributes.
"""
from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

from gpu.drop_ins.vllm.builder import FlashBuilder, Mixin, StepMetadata, TritonBuilder
from gpu.drop_ins.vllm.engines import (
    KV_TYPES,
    Engines,
    LayerDecoder,
    LayerKind,
    append,
    is_eight_bit,
    own_planes,
    unserved,
)
from gpu.drop_ins.vllm.options import read_options
from gpu.drop_ins.vllm.step import DecodeRows
from pkvsim import DecodeShape

LOG = init_logger("vllm.persistentkv")  # vLLM shows the loggers below its own name


class _Impl(Mixin):
    """forward() of either base: decode rows by our engine, then the base on what is left."""

    _decoder: LayerDecoder | None = None
    _writer: Any | None = None  # a CacheWriter, for captured steps
    _float_sinks: torch.Tensor | None = None  # [num_heads] float32, what our engines read of the layer's sinks

    def prepare_decode(self, layer: torch.nn.Module, block_size: int, dtype: torch.dtype,
                       query_tokens: tuple[int, ...], most_rows: int, engines: Engines, appends: bool) -> None:
        """Gives the layer its decoder. Raises ValueError saying what no kernel of ours serves.

        appends: that graphs of decode steps store keys and values by our kernel, where there is one for the cache.
        """
        kind_of_attention = str(getattr(self.attn_type, "value", self.attn_type))
        name = str(dtype).removeprefix("torch.")
        reason = unserved(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_size=self.head_size,
                          head_size_v=layer.head_size_v, alibi=self.alibi_slopes is not None,
                          attention_type=kind_of_attention, kv_cache_dtype=self.kv_cache_dtype, dtype=name,
                          context_ranks=self.total_cp_world_size)
        if reason is not None:
            raise ValueError(reason)
        left, _ = self.sliding_window  # tokens before a query's own that it sees; -1: all
        kv_dtype, kv_scales = KV_TYPES[self.kv_cache_dtype]
        kind = LayerKind(DecodeShape(self.num_heads, self.num_kv_heads, self.head_size, block_size), name,
                         None if left < 0 else left + 1, self.logits_soft_cap or None, self.sinks is not None, kv_dtype,
                         kv_scales, self.scale)
        self._decoder = engines.decoder(kind, query_tokens, most_rows, self._kept_sinks(), self._decoder)
        if appends and kind.stored_by_ours:
            self._writer = engines.writer(kind)
        LOG.info_once("PersistentKV decodes on the GPU's balanced schedule: %s query heads of %s over %s KV heads, "
                      "pages of %s tokens, cache %s", self.num_heads, self.head_size, self.num_kv_heads, block_size,
                      self.kv_cache_dtype)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        kept = self._kept_sinks()
        if kept is not None:
            with torch.inference_mode():  # vLLM may have made either in it
                kept.copy_(self.sinks.detach())  # in place: captured graphs read reloaded sinks there

    def _kept_sinks(self) -> torch.Tensor | None:
        """The layer's sinks in float32, made at the first call, which vLLM's loading of weights makes.

        vLLM's sleep mode keeps what was allocated with the weights. What a builder allocates belongs to the caches,
        whose contents it drops.
        """
        if self._float_sinks is None and self.sinks is not None:
            self._float_sinks = self.sinks.detach().to(torch.float32, copy=True).contiguous()
        return self._float_sinks

    def forward(self, layer: torch.nn.Module, query: torch.Tensor, key: torch.Tensor | None,
                value: torch.Tensor | None, kv_cache: torch.Tensor, attn_metadata: StepMetadata | None,
                output: torch.Tensor, output_scale: torch.Tensor | None = None,
                output_block_scale: torch.Tensor | None = None) -> torch.Tensor:
        if attn_metadata is None:
            return output.fill_(0)  # vLLM's profiling run
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("output_scale: expected None, as outputs are 16-bit")
        done, rows = 0, attn_metadata.decode
        cache = self._values_of(kv_cache)
        if rows is not None:
            done = rows.num_tokens
            k_pages, v_pages = self._pages_of(cache)
            self._decoder.run(rows, query[:done], k_pages, v_pages, output[:done], *self._scales(layer))
        if attn_metadata.base is not None:
            rest = output
            if done:
                query, rest = query[done:], output[done:]
                # A layer that only reads a cache, its own or another's, is given neither.
                key, value = (None if new is None else new[done:] for new in (key, value))
            super().forward(layer, query, key, value, cache, attn_metadata.base, rest)
        return output

    def fused_output_quant_supported(self, quant_key: object) -> bool:
        return False  # our kernel writes 16-bit outputs

    def do_kv_cache_update(self, layer: torch.nn.Module, key: torch.Tensor, value: torch.Tensor,
                           kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        cache, rows = self._values_of(kv_cache), self._rows_of_captured_step(layer)
        if rows is None:
            super().do_kv_cache_update(layer, key, value, cache, slot_mapping)
        else:
            k_pages, v_pages = self._pages_of(cache)
            append(self._writer, rows, key, value, k_pages, v_pages, *self._scales(layer))

    def _rows_of_captured_step(self, layer: torch.nn.Module) -> DecodeRows | None:
        """The rows of a step that is captured whole and only decodes, where our kernel stores; else None.

        Graphs of pieces hold this call for steps of every kind: vLLM captures them without metadata.
        """
        if self._writer is None or not torch.cuda.is_current_stream_capturing():
            return None
        metadata = get_forward_context().attn_metadata
        step = metadata.get(layer.layer_name) if isinstance(metadata, dict) else None
        return step.decode if isinstance(step, StepMetadata) and step.base is None else None

    def _values_of(self, kv_cache: torch.Tensor) -> torch.Tensor:
        return kv_cache

    def _pages_of(self, cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """K and V, each [num_blocks, block_size, num_kv_heads, head_size], of what _values_of gives."""
        return cache.unbind(1)

    def _scales(self, layer: torch.nn.Module) -> tuple[object, object]:
        return None, None


class FlashImpl(_Impl, FlashAttentionImpl):
    """Of 16-bit caches."""


class TritonImpl(_Impl, TritonAttentionImpl):
    """Of 8-bit caches, with one scale of all K and of all V, or one of each token and head."""

    _viewed: tuple | None = None  # where the cache lies that the views below are of
    _values: torch.Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.supports_quant_query_input = False  # our kernel takes 16-bit queries, and this base does as well

    def _values_of(self, kv_cache: torch.Tensor) -> torch.Tensor:
        if not self._is_per_token_head_quant:
            return kv_cache
        place = kv_cache.data_ptr(), kv_cache.shape, kv_cache.stride()
        if place != self._viewed:
            self._values, self._k_scale_cache, self._v_scale_cache = own_planes(kv_cache, self.head_size)
            self._viewed = place
        return self._values

    def _ensure_scale_caches(self, kv_cache: torch.Tensor) -> None:
        """The base would take the scales from between the values; _values_of has them from planes of their own."""

    def _scales(self, layer: torch.nn.Module) -> tuple[object, object]:
        if self._is_per_token_head_quant:
            return self._k_scale_cache, self._v_scale_cache
        if is_eight_bit(self.kv_cache_dtype):
            return layer._k_scale, layer._v_scale
        return None, None  # a layer that --kv-cache-dtype-skip-layers leaves at 16 bits


def _base_backend() -> type[AttentionBackend]:
    """vLLM's backend that the one of the current configuration builds on."""
    return _base_of(get_current_vllm_config().cache_config.cache_dtype)


def _base_of(kv_cache_dtype: str | None) -> type[AttentionBackend]:
    return TritonAttentionBackend if is_eight_bit(kv_cache_dtype) else FlashAttentionBackend


class PersistentBackend(FlashAttentionBackend):
    """The class that vLLM asks what is served; it says what the base of the cache's type does."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = list(KV_TYPES)

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        return TritonImpl if _base_backend() is TritonAttentionBackend else FlashImpl

    @staticmethod
    def get_builder_cls() -> type:
        return TritonBuilder if _base_backend() is TritonAttentionBackend else FlashBuilder

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int,
                           cache_dtype_str: str = "auto") -> tuple[int, ...]:
        return _base_of(cache_dtype_str).get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size,
                                                            cache_dtype_str)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return _base_of(kv_cache_dtype).supports_kv_cache_dtype(kv_cache_dtype)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False  # where a row is cut depends on the others

    @classmethod
    def validate_configuration(cls, *, kv_cache_dtype: str | None, use_batch_invariant: bool = False,
                               use_kv_connector: bool = False, **others: Any) -> list[str]:
        """Why this configuration is refused: all that the base refuses, and what no part of us can serve."""
        reasons = _base_of(kv_cache_dtype).validate_configuration(
            kv_cache_dtype=kv_cache_dtype, use_batch_invariant=use_batch_invariant, use_kv_connector=use_kv_connector,
            **others)
        if use_batch_invariant:
            reasons = [*reasons, "batch invariance not supported"]
        try:
            read_options(get_current_vllm_config().additional_config)
        except ValueError as error:
            reasons = [*reasons, str(error)]
        if use_kv_connector and KV_TYPES.get(kv_cache_dtype or "auto", (None, None))[1] == "token":
            reasons = [*reasons, "KV connector not supported with scales of tokens, which lie in planes of their own"]
        return reasons
