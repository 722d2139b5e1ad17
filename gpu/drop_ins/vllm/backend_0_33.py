"""vLLM's attention backend CUSTOM for vLLM 0.33: what that release changes of what the modules beside it touch.

16-bit caches only, over vLLM's FlashAttention backend. A cache is [num_blocks, num_kv_heads, block_size,
2 * head_size] there, of any order in memory: each token's K and V of a head lie side by side, so that our kernels read
both through strides.
"""
from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from gpu.drop_ins.vllm import backend, builder
from gpu.drop_ins.vllm.options import read_options
from gpu.drop_ins.vllm.step import BY_ROW, MADE_LATER, StepFields


class StepMetadata(builder.StepMetadata):
    """What models clear of images has another name."""

    mm_prefix_query_range_tensor = builder.of_base("mm_prefix_query_range_tensor")


# What this release's steps hold beside what all do.
FIELDS = StepFields(
    by_row=(*BY_ROW, "req_idx", "dcp_local_seq_lens_cpu_upper_bound", "rswa_prefix_lens", "replayssm_decode_base_cpu"),
    made_later=(*MADE_LATER, "_token_to_req_indices_cache", "max_logits_per_req"),
)


class FlashBuilder(builder.FlashBuilder):
    metadata_kind: ClassVar[type[builder.StepMetadata]] = StepMetadata
    step_fields: ClassVar[StepFields] = FIELDS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig,
                 device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Drafters would keep one step's metadata for all drafts, and rows that are planned once have the lengths of the
        # first. vLLM builds metadata for each draft where a builder says this.
        self.supports_draft_decode_metadata_update = False


class FlashImpl(backend.FlashImpl):
    """Of 16-bit caches."""

    supports_dcp: bool = False  # a row's keys lie on one GPU: vLLM refuses to spread them, and says so
    supports_pcp: bool = False

    def _pages_of(self, cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return cache.transpose(1, 2).split(self.head_size, dim=-1)


class PersistentBackend(FlashAttentionBackend):
    """The class that vLLM asks what is served: what FlashAttention is, less what is named here."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        return FlashImpl

    @staticmethod
    def get_builder_cls() -> type:
        return FlashBuilder

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False  # where a row is cut depends on the others

    @classmethod
    def supports_rswa(cls) -> bool:
        return False  # a prefix and a window: our kernels have either

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # steps are cut by the lengths on the host: adaptive verification changes those on the GPU

    @classmethod
    def validate_configuration(cls, **asked: Any) -> list[str]:
        """Why this configuration is refused: all that FlashAttention refuses, and what no part of us can serve."""
        reasons = super().validate_configuration(**asked)
        try:
            read_options(get_current_vllm_config().additional_config)
        except ValueError as error:
            reasons = [*reasons, str(error)]
        return reasons
