"""vLLM of a recorded interface (drop_ins/record_vllm.py), whose own attention is plain float64 on the CPU.

Classes have the members that were recorded and no others, methods take the parameters that they take there, dataclasses
have the fields. So what the adapter calls, passes or replaces by another name than the release has fails.
"""
from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch_paged import paged_attention
from vllm_plain import INT8_SCALE, PlainEngine, PlainWriter, stored

from gpu.drop_ins.vllm import engines as vllm_engines

INTERFACES = Path(__file__).resolve().parents[1] / "drop_ins" / "vllm_interface"
ADAPTERS = {"0.24": "gpu.drop_ins.vllm.backend", "0.33": "gpu.drop_ins.vllm.backend_0_33"}
BUILDER = "gpu.drop_ins.vllm.builder"
OWN_MODULES = (*ADAPTERS.values(), BUILDER)
BASE, FLASH = "vllm.v1.attention.backend", "vllm.v1.attention.backends.flash_attn"
# Which method of a backend says whether it serves what it is asked by this name, as far as the stand-in asks.
ASKED = {"use_dcp": "supports_dcp", "use_pcp": "supports_pcp", "use_rswa": "supports_rswa",
         "use_adaptive_verification": "supports_device_cpu_query_lens_mismatch"}
KINDS = {"plain": inspect.Parameter.POSITIONAL_OR_KEYWORD, "variable": inspect.Parameter.VAR_POSITIONAL,
         "keyword": inspect.Parameter.KEYWORD_ONLY, "keywords": inspect.Parameter.VAR_KEYWORD}


@dataclasses.dataclass(slots=True)
class FakeVllm:
    """What a test sees of it."""

    modules: dict[str, types.ModuleType]
    recorded: dict[str, Any]
    config: Any = None
    said: list[str] = dataclasses.field(default_factory=list)  # log lines, each once
    registered: dict[str, str] = dataclasses.field(default_factory=dict)
    engines: list[PlainEngine] = dataclasses.field(default_factory=list)
    writes: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)  # (by whom, address, rows of output)
    stored: list[int] = dataclasses.field(default_factory=list)  # rows of each call of our writers that had any token
    step: Any = None  # the current step's metadata, by layer
    refused: str | None = None  # what making an engine ends with
    most_grouped: int = 1 << 20  # rows that engines can plan with groups

    @property
    def band(self) -> str:
        return ".".join(self.recorded["release"].split(".")[:2])

    @property
    def adapter(self) -> types.ModuleType:
        return importlib.import_module(ADAPTERS[self.band])

    @property
    def builder(self) -> types.ModuleType:
        return importlib.import_module(BUILDER)

    def named(self, module: str, name: str) -> Any:
        return getattr(self.modules[module], name)

    def members(self, module: str, name: str) -> dict[str, Any]:
        """What is recorded of a class."""
        return self.recorded["modules"][module][name]["members"]

    def pages_of(self, impl: Any, kv_cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """K and V, NHD, as the release's own layers take them from a cache."""
        (expression,) = self.members(FLASH, "FlashAttentionImpl")["forward"]["reads"]
        return eval(expression, {"self": impl, "kv_cache": kv_cache})

    def configure(self, *, cache_dtype: str = "auto", dtype: torch.dtype = torch.float32, drafts: int | None = None,
                  max_num_seqs: int = 16, ubatching: bool = False, data_parallel_size: int = 1,
                  additional_config: Any = None, fast_prefill: bool = False) -> Any:
        """Makes and sets the current VllmConfig."""
        prefill = {"kv_sharing_fast_prefill": fast_prefill} if self.band != "0.24" else {}
        given = {
            "CacheConfig": {"cache_dtype": cache_dtype, **prefill},
            "CompilationConfig": {"max_cudagraph_capture_size": None, "static_forward_context": {}},
            "ModelConfig": {"dtype": dtype},
            "ParallelConfig": {"use_ubatching": ubatching, "data_parallel_size": data_parallel_size},
            "SchedulerConfig": {"max_num_seqs": max_num_seqs},
            "SpeculativeConfig": {"num_speculative_tokens": drafts},
        }
        parts = {name: settle(self.named("vllm.config", name).__new__(self.named("vllm.config", name)), **values)
                 for name, values in given.items()}
        whole = self.named("vllm.config", "VllmConfig")
        self.config = settle(whole.__new__(whole), additional_config=additional_config or {},
                             cache_config=parts["CacheConfig"], compilation_config=parts["CompilationConfig"],
                             model_config=parts["ModelConfig"], parallel_config=parts["ParallelConfig"],
                             scheduler_config=parts["SchedulerConfig"],
                             speculative_config=None if drafts is None else parts["SpeculativeConfig"])
        return self.config


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


def install(vllm: FakeVllm) -> None:
    for module, names in vllm.recorded["modules"].items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            vllm.modules.setdefault(name, types.ModuleType(name)).__dict__.setdefault("__path__", [])
            if end > 1:
                setattr(vllm.modules[".".join(parts[:end - 1])], parts[end - 1], vllm.modules[name])
        for name, entry in names.items():
            setattr(vllm.modules[module], name, _make(vllm, name, entry))


def _make(vllm: FakeVllm, name: str, entry: Any) -> Any:
    if isinstance(entry, dict) and "parameters" in entry:
        return _function(vllm, "", name, entry)
    if not isinstance(entry, dict):
        return entry
    fields = {member: what for member, what in entry["members"].items() if isinstance(what, list)}
    methods = {member: _function(vllm, name, member, what) for member, what in entry["members"].items()
               if isinstance(what, dict) and "property" not in what["decorators"]}
    if any("Enum" in base for base in entry["bases"]) or name == "AttentionBackendEnum":
        return Enum(name, {member: str(default) for member, (_, default) in fields.items()})
    if name == "CommonAttentionMetadata":
        given = [(member, object, dataclasses.field() if default is None else dataclasses.field(default=eval(default)))
                 for member, (_, default) in fields.items()]
        return dataclasses.make_dataclass(name, given, namespace=methods)
    known = {one.__name__: one for module in vllm.modules.values() for one in vars(module).values()
             if isinstance(one, type)}
    bases = tuple(known[base] for base in (text.split("[")[0] for text in entry["bases"]) if base in known)
    body = {"_recorded": frozenset(entry["members"]), **methods}
    for member, (_, default) in fields.items():
        with contextlib.suppress(Exception):
            body[member] = eval(default, {"torch": torch}, known)
    return type(name, bases, body)


def _function(vllm: FakeVllm, owner: str, name: str, entry: dict[str, Any]) -> Any:
    """What takes the recorded parameters, and does what BEHAVIOURS say, or nothing that is known."""
    empty = inspect.Parameter.empty
    signature = inspect.Signature([inspect.Parameter(parameter, KINDS[kind], default=empty if default is None else None)
                                   for kind, parameter, _, default in entry["parameters"]])
    optional = {parameter: default for _, parameter, _, default in entry["parameters"] if default is not None}

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        for parameter, default in optional.items():
            if parameter not in given:
                with contextlib.suppress(Exception):
                    given[parameter] = eval(default)
        either = owner.removeprefix("FlashAttention").removeprefix("TritonAttention")
        behaviour = BEHAVIOURS.get((owner, name)) or BEHAVIOURS.get((either, name))
        if behaviour is None:
            raise NotImplementedError(f"{owner}.{name}")
        return behaviour(vllm, **given)

    stand_in.__name__, stand_in.__signature__ = name, signature
    for decorator in (staticmethod, classmethod):
        if decorator.__name__ in entry["decorators"]:
            return decorator(stand_in)
    return stand_in


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


def _forget(name: str) -> types.ModuleType | None:
    """The module, which no import finds any more, by its package's attribute either."""
    package, _, own = name.rpartition(".")
    if name in OWN_MODULES:
        vars(sys.modules[package]).pop(own, None)
    return sys.modules.pop(name, None)


@contextlib.contextmanager
def fake_vllm(band: str = "0.24") -> Iterator[FakeVllm]:
    """Installs it, and engines that compute on the CPU; the adapter is imported anew inside."""
    vllm = FakeVllm({}, json.loads((INTERFACES / f"{band}.json").read_text()))
    install(vllm)
    kept = {name: _forget(name) for name in (*OWN_MODULES, *vllm.modules)}
    own = (vllm_engines.make_engine, vllm_engines.make_writer, torch.cuda.device, torch.cuda.synchronize,
           torch.cuda.is_current_stream_capturing)
    sys.modules.update(vllm.modules)

    def make_engine(kind: vllm_engines.LayerKind, query_tokens: int) -> PlainEngine:
        if vllm.refused is not None:
            raise ValueError(vllm.refused)
        vllm.engines.append(PlainEngine(vllm, kind, query_tokens))
        return vllm.engines[-1]

    vllm_engines.make_engine = make_engine
    vllm_engines.make_writer = lambda kind: PlainWriter(vllm, kind)
    torch.cuda.device, torch.cuda.synchronize = contextlib.nullcontext, lambda device: None
    torch.cuda.is_current_stream_capturing = lambda: False
    vllm.configure()
    try:
        yield vllm
    finally:
        (vllm_engines.make_engine, vllm_engines.make_writer, torch.cuda.device, torch.cuda.synchronize,
         torch.cuda.is_current_stream_capturing) = own
        for name, module in kept.items():
            _forget(name)
            if module is not None:
                sys.modules[name] = module
