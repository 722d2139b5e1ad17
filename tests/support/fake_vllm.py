"""vLLM of a recorded interface (drop_ins/record_vllm.py), whose own attention is plain float64 on the CPU.

Classes have the members that were recorded and no others, methods take the parameters that they take there, dataclasses
have the fields; vllm_behaviours has what methods do. So what the adapter calls, passes or replaces by another name than
the release has fails.
"""
from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import sys
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from vllm_behaviours import BEHAVIOURS, FLASH, settle
from vllm_plain import PlainEngine, PlainWriter

from gpu.drop_ins.vllm import engines as vllm_engines

INTERFACES = Path(__file__).resolve().parents[1] / "drop_ins" / "vllm_interface"
ADAPTERS = {"0.24": "gpu.drop_ins.vllm.backend", "0.33": "gpu.drop_ins.vllm.backend_0_33"}
BUILDER = "gpu.drop_ins.vllm.builder"
OWN_MODULES = (*ADAPTERS.values(), BUILDER)
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
        given = {
            "CacheConfig": {"cache_dtype": cache_dtype, "kv_sharing_fast_prefill": fast_prefill},
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
