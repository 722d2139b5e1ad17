"""Reads how a checkpoint is quantised: quantization_config of a config.json, or ModelOpt's hf_quant_config.json."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pkvsim.models.quantization import (
    Quantization,
    Stored,
    fp8,
    fp8_rows,
    grouped_int,
    mxfp,
    name_matcher,
    nvfp4,
)

FP8_BLOCK = (128, 128)


def read_quantization(config: Any, expert_type: str | None, error: Callable[[str], ValueError]) -> Quantization:
    """Reads a quantization_config, or the "quantization" of an hf_quant_config.json.

    expert_type: DeepSeek-V4's expert_dtype. `error` makes the ValueError of whatever is not understood.
    """
    if not isinstance(config, dict):
        raise error(f"expected an object, got {type(config).__name__}")
    method = config.get("quant_method")
    if method is None and ("quant_algo" in config or "producer" in config):
        method = "modelopt"
    reader = METHODS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise error(f"expected quant_method to be one of {', '.join(METHODS)}, got {method!r}")
    try:
        return reader(config, expert_type)
    except _Unreadable as problem:
        raise error(str(problem)) from None


class _Unreadable(Exception):
    """A quantisation that is not understood; its text says what."""


def _integer(config: Mapping[str, Any], name: str, default: int | None = None, least: int = 1) -> int:
    value = config.get(name, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _Unreadable(f"expected {name} to be a whole number >= {least}, got {value!r}")
    return value


def _names(config: Mapping[str, Any], *keys: str) -> Callable[[str], bool]:
    return name_matcher([name for key in keys for name in _name_list(config, key)])


def _name_list(config: Mapping[str, Any], key: str) -> list[str]:
    found = config.get(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise _Unreadable(f"expected {key} to be a list of names")
    return found


def _block(config: Mapping[str, Any], name: str = "weight_block_size") -> tuple[int, int] | None:
    block = config.get(name)
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise _Unreadable(f"expected {name} to be two whole numbers, got {block!r:.80}")
    return block[0], block[1]


def _kv_cache(config: Mapping[str, Any]) -> str:
    scheme = config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        return f"{'fp' if scheme.get('type') == 'float' else 'int'}{scheme.get('num_bits')}"
    return scheme.lower() if isinstance(scheme, str) else ""


def _fp8(config: dict[str, Any], expert_type: str | None) -> Quantization:
    scale_bits = 8 if config.get("scale_fmt") == "ue8m0" and expert_type == "fp4" else 32
    named, patterns = _by_layer(config.get("quantized_layers") or {})
    experts = mxfp(4) if expert_type == "fp4" else None
    label = "fp8" + (" with mxfp4 experts" if experts and not named and not patterns else "") + _also(named, patterns)
    return Quantization(
        label=label, default=fp8(_block(config), scale_bits), expert_default=experts, named=named, patterns=patterns,
        excluded=_names(config, "modules_to_not_convert", "ignored_layers"), kv_cache=_kv_cache(config),
    )  # fmt: skip


def _fbgemm(config: dict[str, Any], expert_type: str | None) -> Quantization:
    return Quantization(label="fp8", default=fp8_rows(), excluded=_names(config, "modules_to_not_convert"))


def _mxfp4(config: dict[str, Any], expert_type: str | None) -> Quantization:
    """GPT-OSS: the experts alone."""
    return Quantization(
        label="mxfp4", expert_default=mxfp(4), excluded=_names(config, "modules_to_not_convert")
    )


def _awq(config: dict[str, Any], expert_type: str | None) -> Quantization:
    bits = _integer(config, "bits", config.get("w_bit", 4))
    group = _integer(config, "group_size", config.get("q_group_size", 128), -1)
    stored = grouped_int(bits, group, zero_points=config.get("zero_point", True) is True)
    excluded = _names(config, "modules_to_not_convert")
    return Quantization(label=f"awq {stored.name}", default=stored, excluded=excluded)


def _gptq(config: dict[str, Any], expert_type: str | None) -> Quantization:
    """Zero points are stored for symmetric weights as well, and an int32 group index for every column."""
    bits = _integer(config, "bits", 4)
    stored = grouped_int(bits, _integer(config, "group_size", 128, -1), zero_points=True, column_bits=32)
    if config.get("dynamic"):
        raise _Unreadable("expected all layers alike, got dynamic rules of single layers")
    return Quantization(
        label=f"gptq {stored.name}", default=stored, lm_head=config.get("lm_head") is True,
        excluded=_names(config, "modules_to_not_convert", "modules_in_block_to_not_quantize"),
    )  # fmt: skip


def _bitsandbytes(config: dict[str, Any], expert_type: str | None) -> Quantization:
    """QLoRA (arXiv 2305.14314): a float32 maximum per 64 weights, itself in 8 bits per 256 with double quantisation."""
    excluded = _names(config, "llm_int8_skip_modules")
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return Quantization(label="bitsandbytes int8", default=Stored("int8", 8, row_bits=32), excluded=excluded)
    if not (config.get("load_in_4bit") or config.get("_load_in_4bit")):
        raise _Unreadable("expected load_in_4bit or load_in_8bit to be true")
    overhead = (8 + 32 / 256) / 64 if config.get("bnb_4bit_use_double_quant") else 32 / 64
    stored = Stored(str(config.get("bnb_4bit_quant_type", "fp4")), 4 + overhead)
    return Quantization(label=f"bitsandbytes {stored.name}", default=stored, excluded=excluded)


def _compressed_tensors(config: dict[str, Any], expert_type: str | None) -> Quantization:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _Unreadable("expected config_groups")
    default, targets, label = None, [], []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise _Unreadable("expected weights in every one of config_groups")
        stored = _compressed_weights(weights)
        label.append(stored.name)
        names = _name_list(group, "targets") or ["Linear"]
        if "Linear" in names:
            default = stored
        else:
            targets.append((name_matcher(names), stored))
    return Quantization(
        label=f"compressed-tensors {' and '.join(dict.fromkeys(label))}", default=default, targets=tuple(targets),
        lm_head=True, excluded=_names(config, "ignore"), kv_cache=_kv_cache(config),
    )  # fmt: skip


def _compressed_weights(weights: Mapping[str, Any]) -> Stored:
    bits, group = _integer(weights, "num_bits"), _integer(weights, "group_size", 0, -1)
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    if kind == "float" and bits == 4:
        group = max(group, 0)
        microscaling = weights.get("scale_dtype") == "torch.uint8" or group == 32
        return mxfp(4, group or 32) if microscaling else nvfp4(group or 16)
    if kind == "float" and bits == 8:
        if group == 32:
            return mxfp(8)
        if strategy == "block":
            return fp8(_block(weights, "block_structure") or FP8_BLOCK)
        return fp8_rows() if strategy == "channel" else fp8()
    if kind != "int":
        raise _Unreadable(f"expected int or float weights of 4 or 8 bits, got {kind!r} of {bits}")
    zero_points = weights.get("symmetric") is False
    return grouped_int(bits, group if strategy in ("group", None) else -1, zero_points=zero_points)


def _modelopt(config: dict[str, Any], expert_type: str | None) -> Quantization:
    """ModelOpt leaves the LM head alone unless an exclusion list is there and does not have it."""
    excluded = _names(config, "exclude_modules", "ignore")
    listed = "exclude_modules" in config or "ignore" in config
    layers = config.get("quantized_layers")
    if isinstance(layers, dict):
        named, patterns = _by_layer(layers)
        return Quantization(
            label="modelopt" + _also(named, patterns), named=named, patterns=patterns, kv_cache=_kv_cache(config)
        )
    if config.get("quant_algo") is None:
        return Quantization(label="none", kv_cache=_kv_cache(config))
    stored = _algorithm(config)
    return Quantization(
        label=f"modelopt {stored.name}", default=stored, lm_head=listed, excluded=excluded, kv_cache=_kv_cache(config)
    )


def _algorithm(entry: Any) -> Stored:
    """ModelOpt's quant_algo names (modelopt/torch/export/model_config.py)."""
    algorithm = entry.get("quant_algo") if isinstance(entry, dict) else entry
    group = _integer(entry, "group_size", 0, 0) if isinstance(entry, dict) else 0
    if algorithm == "FP8":
        return fp8()
    if algorithm in ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PC_PT"):
        return fp8_rows()
    if algorithm in ("FP8_PB_WO", "FP8_PB_REAL", "FP8_BLOCK_SCALES"):
        return fp8(FP8_BLOCK)
    if algorithm in ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "NVFP4_SVDQUANT", "W4A8_NVFP4_FP8"):
        return nvfp4(group or 16)
    if algorithm in ("MXFP4", "W4A8_MXFP4_FP8"):
        return mxfp(4)
    if algorithm == "MXFP8":
        return mxfp(8)
    if algorithm in ("INT4_AWQ", "W4A16_AWQ", "W4A8_AWQ", "W4A16"):
        return grouped_int(4, group or 128, zero_points=False)
    if algorithm in ("INT8_SQ", "W8A8_SQ_PER_CHANNEL", "W8A16"):
        return Stored("int8", 8, row_bits=32)
    raise _Unreadable(f"expected a known quant_algo, got {algorithm!r}")


def _by_layer(
    layers: Mapping[str, Any],
) -> tuple[dict[str, Stored], tuple[tuple[Callable[[str], bool], Stored], ...]]:
    """quantized_layers: (types by full name, types by pattern)."""
    named = {name: _algorithm(entry) for name, entry in layers.items() if "*" not in name}
    patterns = tuple((name_matcher([name]), _algorithm(entry)) for name, entry in layers.items() if "*" in name)
    return named, patterns


def _also(named: Mapping[str, Stored], patterns: Sequence[tuple[Callable[[str], bool], Stored]]) -> str:
    kinds = sorted({stored.name for stored in [*named.values(), *(stored for _, stored in patterns)]})
    return f" {' and '.join(kinds)} by layer" if kinds else ""


METHODS: dict[str, Callable[[dict[str, Any], str | None], Quantization]] = {
    "fp8": _fp8, "compressed-tensors": _compressed_tensors, "awq": _awq, "gptq": _gptq, "auto-round": _gptq,
    "bitsandbytes": _bitsandbytes, "mxfp4": _mxfp4, "modelopt": _modelopt, "modelopt_fp4": _modelopt,
    "fbgemm_fp8": _fbgemm,
}  # fmt: skip
