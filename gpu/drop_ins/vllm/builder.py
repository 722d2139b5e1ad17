"""Metadata of vLLM's steps for the backend CUSTOM: which rows decode on our kernel, and the base backend's of the rest.

gpu.drop_ins.vllm.backend has the layers' side, and says what both are written for.
"""
from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder

from gpu.drop_ins.vllm.engines import Engines
from gpu.drop_ins.vllm.options import read_options
from gpu.drop_ins.vllm.step import FIELDS, Cut, DecodeRows, StepFields, cut_step, served_query_tokens, without_first
from pkvsim.options import MAX_QUERY_TOKENS

# Whether captured decode steps store keys and values by our kernel too, beside which attention is launched and planned.
# vLLM's leaves that until it has ended. Tokens are the same; on an H200 examples/results/h200_vllm.md has the times.
APPENDS_IN_GRAPHS = True
LOG = init_logger("vllm.persistentkv")  # vLLM shows the loggers below its own name
Mixin: Any = object  # what stands before either of vLLM's classes, whose methods super() finds


def of_base(name: str) -> property:
    """An attribute of the base backend's metadata: models that attend to whole images in some layers alone clear it in
    the others' metadata, under this name."""

    def read(step: StepMetadata) -> Any | None:
        return getattr(step.base, name, None)

    def write(step: StepMetadata, value: Any | None) -> None:
        if step.base is not None:
            setattr(step.base, name, value)

    return property(read, write)


@dataclass(eq=False)
class StepMetadata:
    """What forward() needs of a step: the rows that decode here, and the base backend's metadata of the others."""

    num_actual_tokens: int
    slot_mapping: torch.Tensor  # [num_tokens] int64
    decode: DecodeRows | None
    base: Any | None  # None where no row is left for it

    mm_prefix_range = of_base("mm_prefix_range")
    mm_prefix_range_tensor = of_base("mm_prefix_range_tensor")


class _Builder(Mixin):
    """build() of either base: it cuts the step, and has the base build the metadata of the rows that prefill."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    base_name: ClassVar[str]
    # What differs between vLLM's releases.
    metadata_kind: ClassVar[type[StepMetadata]] = StepMetadata
    step_fields: ClassVar[StepFields] = FIELDS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig,
                 device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        speculative = vllm_config.speculative_config
        drafts = 0 if speculative is None else speculative.num_speculative_tokens or 0
        self._query_tokens = served_query_tokens(drafts)
        self._most_rows = max(vllm_config.scheduler_config.max_num_seqs,
                              vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        self._engines = Engines(device, read_options(vllm_config.additional_config).shared_prefixes)
        # Ranks that idle beside others replay graphs over lengths that are nobody's, and drafters over lengths that
        # run past a row's end: only vLLM's slots say that nothing is to be stored then.
        self._appends = (
            APPENDS_IN_GRAPHS and speculative is None and vllm_config.parallel_config.data_parallel_size == 1)
        self._num_prepared, self._decodes = 0, True
        if vllm_config.parallel_config.use_ubatching:
            self._leave("two halves of a batch at once, on streams of their own")
        if vllm_config.cache_config.kv_sharing_fast_prefill:
            self._leave("fast prefill of shared caches, whose steps' lengths reach the host by a copy that nothing has "
                        "waited for when they are cut")
        self._prepare_layers()
        if self._decodes:
            self.reorder_batch_threshold = self._query_tokens[-1]
            if 1 + drafts > self._query_tokens[-1]:
                LOG.warning_once("PersistentKV leaves rows that verify %s drafts to vLLM's %s, as it serves at most %s "
                                 "query tokens a row", drafts, self.base_name, MAX_QUERY_TOKENS)

    def _prepare_layers(self) -> None:
        """Compiles what the layers decode on, before any capture. A drafter's builder gets layers after it was made."""
        names, self._num_prepared = self.layer_names[self._num_prepared:], len(self.layer_names)
        layers = self.vllm_config.compilation_config.static_forward_context
        for name in names:
            if not self._decodes:
                return
            layer = layers[name]
            try:
                layer.impl.prepare_decode(layer, self.kv_cache_spec.block_size, self.vllm_config.model_config.dtype,
                                          self._query_tokens, self._most_rows, self._engines, self._appends)
            except (ValueError, ImportError) as error:
                self._leave(str(error))

    def _leave(self, reason: str) -> None:
        """The base backend decodes too. Metadata of other groups' builders must not reach these layers."""
        self._decodes = self.supports_update_block_table = False
        LOG.warning_once("PersistentKV leaves decode steps to vLLM's %s, as it does not serve: %s", self.base_name,
                         reason)

    def _cut(self, common: CommonAttentionMetadata) -> Cut:
        if len(self.layer_names) != self._num_prepared:
            self._prepare_layers()
        if not self._decodes:
            return Cut(0, 1, True)
        images = common.mm_req_doc_ranges and any(common.mm_req_doc_ranges.values())
        if common.causal is not True or images:
            # A captured decode step stays as it was captured: its rows' tokens come after all of their images.
            which = "with images that are attended to whole (captured ones apart)" if images else (
                "whose attention is not causal")
            LOG.warning_once("PersistentKV leaves steps %s to vLLM's %s", which, self.base_name)
            return Cut(0, 1, True)
        return cut_step(common.query_start_loc_cpu, common.num_actual_tokens, self._query_tokens, self._most_rows)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata,
              fast_build: bool = False) -> StepMetadata:
        common = common_attn_metadata
        cut, decode, base = self._cut(common), None, None
        if cut.rows:
            decode = DecodeRows(common.seq_lens[:cut.rows], common.block_table_tensor[:cut.rows], cut.rows,
                                cut.query_tokens)
        if decode is None:
            base = super().build(0, common, fast_build)
        elif cut.rest:
            rest = without_first(common, decode.num_rows, decode.num_tokens, self.step_fields)
            base = super().build(0, rest, fast_build)
        return self.metadata_kind(common.num_actual_tokens, common.slot_mapping, decode, base)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> StepMetadata:
        return self.build(0, common_attn_metadata)  # the base's may write to metadata of its own kind

    def update_block_table(self, metadata: StepMetadata, blk_table: torch.Tensor,
                           slot_mapping: torch.Tensor) -> StepMetadata:
        updated = copy.copy(metadata)
        updated.slot_mapping = slot_mapping
        rows, tokens = 0, 0
        if metadata.decode is not None:
            rows, tokens = metadata.decode.num_rows, metadata.decode.num_tokens
            updated.decode = DecodeRows(metadata.decode.seq_lens, blk_table[:rows], rows, metadata.decode.query_tokens)
        if metadata.base is not None:
            updated.base = super().update_block_table(metadata.base, blk_table[rows:], slot_mapping[tokens:])
        return updated

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        return False


class FlashBuilder(_Builder, FlashAttentionMetadataBuilder):
    """Of 16-bit caches."""

    base_name = "FLASH_ATTN"


class TritonBuilder(_Builder, TritonAttentionMetadataBuilder):
    """Of 8-bit caches."""

    base_name = "TRITON_ATTN"
