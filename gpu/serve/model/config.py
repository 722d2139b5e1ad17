"""What a decoder is made of: read from a Hugging Face config.json, a preset of pkvsim or a GGUF file's own words.

Dense decoders of the Llama, Mistral, Qwen2 and Qwen3 families: RMS norms, rotary positions, grouped queries, SiLU.
"""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pkvsim import DecodeShape
from pkvsim.models.hugging_face import model_from_config
from pkvsim.models.model_spec import ModelSpec
from pkvsim.models.presets import catalogue, get_model

FAMILIES = {  # architecture: (biases of q, k, v by default, norms of query and key heads)
    "LlamaForCausalLM": (False, False),
    "MistralForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}
OUTPUT_BIASES = ("LlamaForCausalLM", "Qwen3ForCausalLM")  # where attention_bias gives all four projections one
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
QWEN_WINDOW_LAYERS = 28  # max_window_layers of a config that has none, as Transformers' Qwen2Config and Qwen3Config
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RopeFrequencies:
    """inv_freq [head_dim / 2] float64, radians per position; factor multiplies cosines and sines (YaRN)."""

    inv_freq: np.ndarray
    factor: float = 1.0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ModelConfig:
    """Sizes and constants of a decoder."""

    name: str
    architecture: str
    hidden_size: int
    mlp_width: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int  # tokens
    norm_eps: float
    rope: RopeFrequencies
    tied: bool  # the embedding is the output matrix too
    qkv_bias: bool
    output_bias: bool  # of attention's output projection
    mlp_bias: bool
    head_norms: bool  # RMS norms of each query and key head
    window: int | None  # tokens that every layer attends to, the query's own included
    eos_token_ids: tuple[int, ...]
    dtype: str  # of the checkpoint, one of DTYPES
    source: Mapping[str, Any]  # the config as Hugging Face has it

    def shape(self, page_size: int) -> DecodeShape:
        return DecodeShape(self.num_q_heads, self.num_kv_heads, self.head_dim, page_size)

    def spec(self) -> ModelSpec:
        """The same model as pkvsim knows it."""
        return model_from_config(dict(self.source), name=self.name, source=self.name, where=self.name)


def find_config(model: str | Path) -> ModelConfig:
    """The config of a preset's name, of a folder with config.json, or of a config.json. ValueError naming the model."""
    presets = catalogue()
    if str(model) in presets:
        return read_config(_json(presets[str(model)])["config"], name=str(model))
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json" or not path.is_file():
        raise ValueError(f"model: expected one of {', '.join(presets)}, smollm2, a .gguf file, or a folder with "
                         f"config.json, got {str(model)!r}")
    config, beside = _json(path), path.with_name("generation_config.json")
    if path.name == "config.json" and beside.is_file():  # chat models name the tokens that end a turn there
        config = {**config, "eos_token_id": _json(beside).get("eos_token_id", config.get("eos_token_id"))}
    return read_config(config, name=path.parent.name if path.name == "config.json" else path.stem)


def read_config(config: Mapping[str, Any], *, name: str) -> ModelConfig:
    """The decoder of a parsed config.json. ValueError naming the field that is missing or not served."""

    def fail(field: str, expected: str) -> ValueError:
        return ValueError(f"{name}: {field}: expected {expected}, got {config.get(field)!r}")

    def integer(field: str, default: int | None = None) -> int:
        value = config.get(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise fail(field, "an integer of 1 or more")
        return value

    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise fail("architectures", f"one of {', '.join(FAMILIES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise fail("hidden_act", "silu")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{name}: quantization_config: expected none, as weights are served in 16 bits")
    biased, head_norms = FAMILIES[architecture]
    heads, hidden = integer("num_attention_heads"), integer("hidden_size")
    head_dim = integer("head_dim", hidden // heads)
    if head_dim % 2:
        raise fail("head_dim", "an even number, whose halves rotate")
    if config.get("partial_rotary_factor") not in (None, 1):
        raise fail("partial_rotary_factor", "1, as whole heads rotate")
    attention_bias = bool(config.get("attention_bias", False)) and architecture in OUTPUT_BIASES
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if dtype not in DTYPES:
        raise fail("torch_dtype", f"one of {', '.join(DTYPES)}")
    eos = config.get("eos_token_id")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in eos):
        raise fail("eos_token_id", "token ids")
    return ModelConfig(
        name=name,
        architecture=architecture,
        hidden_size=hidden,
        mlp_width=integer("intermediate_size"),
        num_layers=integer("num_hidden_layers"),
        num_q_heads=heads,
        num_kv_heads=integer("num_key_value_heads", heads),
        head_dim=head_dim,
        vocab_size=integer("vocab_size"),
        max_context=integer("max_position_embeddings"),
        norm_eps=positive(config, "rms_norm_eps", f"{name}: rms_norm_eps", 1e-6),
        rope=rope_frequencies(config, head_dim, name=name),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=biased or attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        head_norms=head_norms,
        window=_window(config, architecture, name, integer("num_hidden_layers")),
        eos_token_ids=tuple(eos),
        dtype=dtype,
        source=config,
    )


def rope_frequencies(config: Mapping[str, Any], head_dim: int, *, name: str) -> RopeFrequencies:
    """Radians per position of each pair. Formulas: Llama 3.1's and YaRN's (arXiv 2309.00071, equations 16 to 22), as
    Transformers' modeling_rope_utils has them. ValueError for another kind of scaling."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"{name}: rope_scaling: expected one object for all layers, got {rope!r}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    told = config if rope.get("rope_theta") is None else rope
    theta = positive(told, "rope_theta", f"{name}: rope_theta", 10000.0)
    if theta <= 1:
        raise ValueError(f"{name}: rope_theta: expected a number above 1, got {theta!r}")
    inv_freq = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if kind not in ROPE_TYPES:
        raise ValueError(f"{name}: rope_type: expected one of {', '.join(ROPE_TYPES)}, got {kind!r}")
    if kind == "default":
        return RopeFrequencies(inv_freq=inv_freq)

    def number(field: str, default: Any = None) -> float:
        return positive(rope, field, f"{name}: rope_scaling: {field}", default)

    factor = number("factor")
    if kind == "linear":
        return RopeFrequencies(inv_freq=inv_freq / factor)
    original = number("original_max_position_embeddings", config.get("max_position_embeddings"))
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if high <= low:
            raise ValueError(f"{name}: rope_scaling: high_freq_factor: expected a number above low_freq_factor, "
                             f"{low:g}, got {high:g}")
        turns = original * inv_freq / (2 * np.pi)  # of a pair over the original context
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return RopeFrequencies(inv_freq=(1 - smooth) * inv_freq / factor + smooth * inv_freq)

    def pair_of(rotations: float) -> float:
        """The pair, as a fraction, that turns so often over the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(number("beta_fast", 32)), pair_of(number("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)

    def grown(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    own = rope.get("mscale") and rope.get("mscale_all_dim")
    scale = number("attention_factor",
                   grown(number("mscale")) / grown(number("mscale_all_dim")) if own else grown(1.0))
    return RopeFrequencies(inv_freq=ramp * inv_freq / factor + (1 - ramp) * inv_freq, factor=scale)


def positive(config: Mapping[str, Any], field: str, where: str, default: Any = None) -> float:
    """The field, or the default where it is missing. ValueError naming `where` unless it is a number above 0."""
    value = config.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{where}: expected a number above 0, got {value!r}")
    return float(value)


def _window(config: Mapping[str, Any], architecture: str, name: str, num_layers: int) -> int | None:
    """The window of all layers. Qwen's take one only with use_sliding_window, in layers from max_window_layers on or
    those that layer_types names; ValueError where not all layers are alike."""
    window = config.get("sliding_window")
    qwen = architecture.startswith("Qwen")
    if window is None or architecture == "LlamaForCausalLM" or qwen and not config.get("use_sliding_window", False):
        return None
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"{name}: sliding_window: expected an integer of 1 or more, got {window!r}")
    if not qwen:
        return window
    types = config.get("layer_types")
    if isinstance(types, list):
        windowed = [kind == "sliding_attention" for kind in types]
        if len(set(windowed)) > 1:
            raise ValueError(f"{name}: layer_types: expected layers of one type, as all share a window, got {types!r}")
        return window if all(windowed) else None
    first = config.get("max_window_layers")
    first = QWEN_WINDOW_LAYERS if first is None else first
    if isinstance(first, int) and (first == 0 or first >= num_layers):
        return None if first else window
    raise ValueError(f"{name}: max_window_layers: expected 0, or at least {num_layers} for none, as all layers share a "
                     f"window, got {first!r}")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot read a model: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: cannot read a model: expected an object, got {type(found).__name__}")
    return found


def known_to_pkvsim(config: ModelConfig) -> ModelSpec:
    """The preset of that name where there is one, which has a source of its own; else the model as it was read. So is
    a preset that is one GPU's share of several, since here one serves the whole."""
    preset = get_model(config.name) if config.name in catalogue() else None
    return preset if preset is not None and preset.tensor_parallel == 1 else config.spec()
