"""What the methods of fake_vllm's classes do, by their names: attention in float64, stores, and what backends answer."""
from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch_paged import paged_attention
from vllm_plain import INT8_SCALE, stored

from gpu.drop_ins.vllm import engines as vllm_engines

if TYPE_CHECKING:
    from fake_vllm import FakeVllm

BASE, FLASH = "vllm.v1.attention.backend", "vllm.v1.attention.backends.flash_attn"
# Which method of a backend says whether it serves what it is asked by this name, as far as the stand-in asks.
ASKED = {"use_dcp": "supports_dcp", "use_pcp": "supports_pcp", "use_rswa": "supports_rswa",
         "use_adaptive_verification": "supports_device_cpu_query_lens_mismatch"}


@dataclasses.dataclass(slots=True)
class BaseMetadata:
    """What the base backends' builders make of a step."""

    common: Any
    fast_build: bool
    mm_prefix_range: Any = None
    mm_prefix_range_tensor: Any = None
    mm_prefix_query_range_tensor: Any = None


def settle(owner: Any, **values: Any) -> Any:
    """Sets attributes that the owner's class is recorded to have."""
    for name, value in values.items():
        assert any(name in vars(one).get("_recorded", ()) for one in type(owner).__mro__), f"{type(owner)}: {name}"
        object.__setattr__(owner, name, value)
    return owner


def _init_builder(vllm: FakeVllm, self: Any, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any,
                  device: torch.device) -> None:
    settle(self, kv_cache_spec=kv_cache_spec, layer_names=layer_names, vllm_config=vllm_config)
    updates = "supports_draft_decode_metadata_update"
    if any(updates in vars(one).get("_recorded", ()) for one in type(self).__mro__):
        settle(self, **{updates: True})


def _build(vllm: FakeVllm, self: Any, common_prefix_len: int, common_attn_metadata: Any,
           fast_build: bool) -> BaseMetadata:
    assert common_prefix_len == 0
    common = common_attn_metadata
    lens = common.query_start_loc.diff()
    assert common.num_reqs == len(lens) == len(common.seq_lens) == len(common.block_table_tensor)
    assert common.query_start_loc[0] == 0 and torch.equal(common.query_start_loc, common.query_start_loc_cpu)
    assert int(lens.sum()) <= common.num_actual_tokens and int(lens.max()) <= common.max_query_len
    for name in ("positions", "slot_mapping"):
        assert getattr(common, name) is None or len(getattr(common, name)) >= common.num_actual_tokens
    ranges = common.mm_req_doc_ranges
    tensor = None if ranges is None else torch.tensor(
        [[*(ranges.get(row) or [(0, 0)])[0]] for row in range(common.num_reqs)])
    if "mm_prefix_query_range_tensor" in vllm.members(FLASH, "FlashAttentionMetadata"):
        return BaseMetadata(common, fast_build, mm_prefix_query_range_tensor=tensor)
    return BaseMetadata(common, fast_build, ranges, tensor)


def _update(vllm: FakeVllm, self: Any, metadata: BaseMetadata, blk_table: torch.Tensor,
            slot_mapping: torch.Tensor) -> BaseMetadata:
    common = metadata.common.replace(block_table_tensor=blk_table, slot_mapping=slot_mapping)
    return BaseMetadata(common, metadata.fast_build)


def _init_impl(vllm: FakeVllm, self: Any, num_heads: int, head_size: int, scale: float, num_kv_heads: int,
               alibi_slopes: Any, sliding_window: int | None, kv_cache_dtype: str, logits_soft_cap: float | None,
               attn_type: Any, kv_sharing_target_layer_name: str | None, sinks: torch.Tensor | None,
               **others: Any) -> None:
    settle(self, num_heads=num_heads, head_size=head_size, scale=scale, num_kv_heads=num_kv_heads,
           alibi_slopes=alibi_slopes, sliding_window=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
           kv_cache_dtype=kv_cache_dtype, logits_soft_cap=logits_soft_cap or 0, sinks=sinks, total_cp_world_size=1,
           attn_type="decoder" if attn_type is None else attn_type, supports_quant_query_input=True)
    theirs = next(one for one in type(self).__mro__ if "_recorded" in vars(one))
    if "_is_per_token_head_quant" in theirs._recorded:
        settle(self, _is_per_token_head_quant=kv_cache_dtype.endswith("per_token_head"))


def _type_of(self: Any) -> str | None:
    return vllm_engines.KV_TYPES[self.kv_cache_dtype][0]


def _forward(vllm: FakeVllm, self: Any, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
             kv_cache: torch.Tensor, attn_metadata: BaseMetadata, output: torch.Tensor, output_scale: Any,
             output_block_scale: Any) -> torch.Tensor:
    assert output_scale is None and output_block_scale is None
    common, window = attn_metadata.common, self.sliding_window[0]
    scales = (None, None) if _type_of(self) is None else (layer._k_scale, layer._v_scale)
    if self.kv_cache_dtype.endswith("per_token_head"):
        scales = self._k_scale_cache, self._v_scale_cache
    pages = [stored(pages, _type_of(self), scale).transpose(1, 2)
             for pages, scale in zip(vllm.pages_of(self, kv_cache), scales)]
    starts = common.query_start_loc.tolist()
    for row, (begin, end) in enumerate(zip(starts, starts[1:])):
        if end > begin:
            found, _ = paged_attention(query[None, begin:end], *pages, common.block_table_tensor[row:row + 1],
                                       common.seq_lens[row:row + 1], self.scale, None if window < 0 else window + 1,
                                       self.logits_soft_cap or None, self.sinks)
            output[begin:end] = found[0]
    vllm.writes.append(("base", output.data_ptr(), starts[-1]))
    return output


def _store(vllm: FakeVllm, self: Any, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor,
           slot_mapping: torch.Tensor) -> None:
    kind = _type_of(self)
    for side, (pages, new) in enumerate(zip(vllm.pages_of(self, kv_cache), (key, value))):
        for token, slot in enumerate(slot_mapping.tolist()):
            block, place = divmod(slot, pages.shape[1])
            if slot < 0:
                continue
            if kind is None:
                pages[block, place] = new[token]
                continue
            if self.kv_cache_dtype.endswith("per_token_head"):
                scale = torch.full(new[token].shape[:1], INT8_SCALE if kind == "int8" else 0.25)
                (self._k_scale_cache, self._v_scale_cache)[side][block, place] = scale
            else:
                scale = (layer._k_scale, layer._v_scale)[side].expand(new.shape[1])
            exact = new[token] / scale[:, None]
            own = torch.int8 if kind == "int8" else torch.float8_e4m3fn
            pages[block, place] = exact.to(own).view(pages.dtype)


def _validate(vllm: FakeVllm, cls: type, **given: Any) -> list[str]:
    reasons = [] if cls.supports_kv_cache_dtype(given["kv_cache_dtype"]) else ["kv_cache_dtype not supported"]
    asks = vllm.members(BASE, "AttentionBackend")["validate_configuration"]["asks"]
    return reasons + [f"{asked} not supported" for asked, says in ASKED.items()
                      if given.get(asked) and says in asks and not getattr(cls, says)()]


def _shape(vllm: FakeVllm, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int,
           cache_dtype_str: str) -> tuple[int, ...]:
    return num_blocks, 2, block_size, num_kv_heads, head_size + 4 * cache_dtype_str.endswith("per_token_head")


# (class, or what is left of it without its base's name, method) -> what is done with the stand-in and the arguments.
BEHAVIOURS: dict[tuple[str, str], Callable[..., Any]] = {
    ("", "get_current_vllm_config"): lambda vllm: vllm.config,
    ("", "get_forward_context"): lambda vllm: types.SimpleNamespace(attn_metadata=vllm.step),
    ("", "init_logger"): lambda vllm, name: types.SimpleNamespace(
        info_once=lambda text, *args: vllm.said.append(text % args),
        warning_once=lambda text, *args: vllm.said.append(text % args)),
    ("", "register_backend"): lambda vllm, backend, class_path, is_mamba: vllm.registered.update(
        {backend.name: class_path}),
    ("MetadataBuilder", "__init__"): _init_builder,
    ("MetadataBuilder", "build"): _build,
    ("MetadataBuilder", "update_block_table"): _update,
    ("AttentionMetadataBuilder", "build_for_drafting"): lambda vllm, self, common_attn_metadata, draft_index:
        self.build(common_prefix_len=0, common_attn_metadata=common_attn_metadata, fast_build=True),
    ("AttentionImplBase", "process_weights_after_loading"): lambda vllm, self, act_dtype: None,
    ("Impl", "__init__"): _init_impl,
    ("Impl", "forward"): _forward,
    ("Impl", "do_kv_cache_update"): _store,
    ("AttentionBackend", "validate_configuration"): _validate,
    ("AttentionBackend", "supports_kv_cache_dtype"): lambda vllm, cls, kv_cache_dtype: kv_cache_dtype in (
        None, *vllm_engines.KV_TYPES),
    ("Backend", "supports_kv_cache_dtype"): lambda vllm, cls, kv_cache_dtype: kv_cache_dtype in (
        None, *cls.supported_kv_cache_dtypes),
    ("AttentionBackend", "supports_dcp"): lambda vllm, cls: cls.get_impl_cls().supports_dcp,
    ("AttentionBackend", "supports_pcp"): lambda vllm, cls: cls.get_impl_cls().supports_pcp,
    ("AttentionBackend", "supports_device_cpu_query_lens_mismatch"): lambda vllm, cls: True,
    ("FlashAttentionBackend", "supports_rswa"): lambda vllm, cls: True,
    ("Backend", "get_kv_cache_shape"): _shape,
    ("CommonAttentionMetadata", "replace"): lambda vllm, self, kwargs: dataclasses.replace(self, **kwargs),
}
