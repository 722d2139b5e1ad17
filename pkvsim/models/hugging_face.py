"""Hugging Face config.json to ModelSpec: which reader an architecture has, and the sum of what it finds."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pkvsim.models.config_fields import VISION, Fields
from pkvsim.models.families import grouped, hybrid, latent, mixed
from pkvsim.models.families.attention import Split
from pkvsim.models.families.layer_plan import LayerPlan, ModelPlan, Reading
from pkvsim.models.model_spec import LayerSpec, ModelSpec, Weights
from pkvsim.models.modules import ATTENTION, EXPERT, FIXED, MLP, Module, module_weights, sum_modules
from pkvsim.models.quantization import NOT_QUANTISED, Quantization
from pkvsim.models.quantization_config import read_quantization
from pkvsim.shapes import MAX_TOKENS, check_int

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
READERS: dict[str, Callable[[Reading], ModelPlan]] = {
    name: partial(grouped.read_grouped, style=style) for name, style in grouped.STYLES.items()
}
READERS |= {
    "Glm4MoeForCausalLM": grouped.read_glm4_moe,
    "SeedOssForCausalLM": grouped.read_seed_oss,
    "Llama4ForCausalLM": mixed.read_llama4,
    "Llama4ForConditionalGeneration": mixed.read_llama4,
    "Gemma4ForCausalLM": mixed.read_gemma4,
    "Gemma4ForConditionalGeneration": mixed.read_gemma4,
    "Step3p7FlashForCausalLM": mixed.read_step3p7,
    "Step3p7ForConditionalGeneration": mixed.read_step3p7,
    "MiniMaxM3SparseForCausalLM": mixed.read_minimax_m3,
    "MiniMaxM3SparseForConditionalGeneration": mixed.read_minimax_m3,
    "DeciLMForCausalLM": mixed.read_decilm,
    "DeepseekV2ForCausalLM": latent.read_deepseek,
    "DeepseekV3ForCausalLM": latent.read_deepseek,
    "DeepseekV32ForCausalLM": latent.read_deepseek,
    "GlmMoeDsaForCausalLM": latent.read_deepseek,
    "Glm4MoeLiteForCausalLM": latent.read_deepseek,
    "DeepseekV4ForCausalLM": latent.read_deepseek_v4,
    "KimiLinearForCausalLM": hybrid.read_kimi_linear,
    "Qwen3NextForCausalLM": hybrid.read_qwen_hybrid,
    "Qwen3_5ForCausalLM": hybrid.read_qwen_hybrid,
    "Qwen3_5MoeForCausalLM": hybrid.read_qwen_hybrid,
    "Qwen3_5ForConditionalGeneration": hybrid.read_qwen_hybrid,
    "Qwen3_5MoeForConditionalGeneration": hybrid.read_qwen_hybrid,
    "NemotronHForCausalLM": hybrid.read_nemotron_h,
}
# Wrappers around a text model that names its own architecture.
WRAPPERS = ("KimiK25ForConditionalGeneration", "KimiK3ForConditionalGeneration", "Mistral3ForConditionalGeneration")
TEXT_MODELS = {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"}
ARCHITECTURES = (*READERS, *WRAPPERS)
PRECISION_IN_NAME = re.compile(r"nvfp4|mxfp[48]|fp8|fp4|int[48]|awq|gptq|w4a16|w8a8|bnb|[48]bit", re.IGNORECASE)


def model_from_config(
    config: Any, *, name: str, source: str, where: str, tensor_parallel: int = 1, quantization: Any = None
) -> ModelSpec:
    """The model of a parsed config.json.

    where: names the file in errors; source: goes into the spec. quantization: the parsed hf_quant_config.json beside
    it, which counts where the config has no quantization_config. Raises ValueError naming the field that is missing,
    unknown or does not fit.
    """
    split = Split(check_int("tensor_parallel", tensor_parallel, 1, MAX_TOKENS), name)
    outer = Fields(config, where)
    outer.architecture = _architecture(outer)
    fields, architecture = _text_part(outer)
    element_bytes = _element_bytes(fields, outer)
    method = _quantization(fields, outer, quantization, where)
    tied_field = _tied(fields, outer)
    plan = READERS[architecture](Reading(fields, split, element_bytes))
    tied = plan.tied if tied_field is None else tied_field
    hidden, vocabulary = fields.integer("hidden_size"), fields.integer("vocab_size")
    max_context = fields.first_integer("max_position_embeddings", "model_max_length", "max_sequence_length")
    ignored = fields.finish()
    notes = list(plan.notes)
    if fields is not outer:
        ignored = tuple(sorted({**dict(outer.finish()), **dict(ignored)}.items()))
        if any(reason == VISION and key.endswith("_config") for key, reason in ignored):
            notes.append("the text part alone: vision and audio towers are left out of every figure")
    precision = PRECISION_IN_NAME.search(name)
    if method.label == "none" and precision:
        notes.append(
            f"the name says {precision[0]}, but neither quantization_config nor an "
            f"hf_quant_config.json beside the file does: weights are counted in {8 * element_bytes} bits"
        )
    if plan.mtp_layers:
        notes.append("multi-token prediction heads are counted apart, as engines load them for speculation alone")

    share = 1 / split.parallel
    table = Module(
        name="embed_tokens", part=MLP, out_features=vocabulary, in_features=hidden, share=share, linear=False
    )
    embedding = module_weights(table, element_bytes, method)
    head = Module(name="lm_head", part=MLP, out_features=vocabulary, in_features=hidden, share=share)
    lm_head = embedding if tied else module_weights(head, element_bytes, method)
    final = (Module(name="norm", part=FIXED, vector=hidden), *plan.extra)
    return ModelSpec(
        name=name,
        source=source,
        architecture=architecture,
        tensor_parallel=split.parallel,
        hidden_size=hidden,
        vocab_size=vocabulary,
        max_context=max_context,
        layers=_layers(plan.layers, element_bytes, method),
        embedding=Weights(embedding.parameters, embedding.bytes),
        final_norm=sum_modules(final, FIXED, element_bytes, method),
        lm_head=lm_head,
        tied_embeddings=tied,
        mtp_layers=_layers(plan.mtp_layers, element_bytes, method),
        quantization=method.label,
        kv_cache_type=method.kv_cache,
        ignored=ignored,
        notes=tuple(notes),
    )


def _layers(plans: tuple[LayerPlan, ...], element_bytes: int, method: Quantization) -> tuple[LayerSpec, ...]:
    def weights(plan: LayerPlan, part: str) -> Weights:
        return sum_modules(plan.modules, part, element_bytes, method)

    return tuple(
        LayerSpec(
            attention=plan.attention,
            feed_forward=plan.feed_forward,
            attention_weights=weights(plan, ATTENTION),
            norms_and_router=weights(plan, FIXED),
            mlp=weights(plan, MLP),
            expert=weights(plan, EXPERT),
        )
        for plan in plans
    )


def _architecture(fields: Fields) -> str:
    named = fields.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES:
        raise fields.error(
            "architectures", f"expected one of the {len(ARCHITECTURES)} that are read (pkvsim models), got {named!r}"
        )
    return named[0]


def _text_part(outer: Fields) -> tuple[Fields, str]:
    """(the fields of the language model, its architecture)."""
    if outer.config.get("text_config") is None:
        if outer.architecture in WRAPPERS:
            raise outer.error("text_config", "missing")
        return outer, outer.architecture
    inner = outer.part("text_config")
    if outer.architecture not in WRAPPERS:
        return inner, outer.architecture
    named, by_type = inner.get("architectures"), TEXT_MODELS.get(str(inner.get("model_type")))
    found = named[0] if isinstance(named, list) and len(named) == 1 else by_type
    if not isinstance(found, str) or found not in READERS:
        raise inner.error("architectures", f"expected one that is read, got {named!r}")
    inner.architecture = found
    return inner, found


def _element_bytes(fields: Fields, outer: Fields) -> int:
    """Bytes per weight that is not quantised."""
    found = None
    for part in (outer, fields):
        for key in ("torch_dtype", "dtype"):
            named = part.get(key)
            if named is not None and (not isinstance(named, str) or named not in DTYPE_BYTES):
                raise part.error(key, f"expected one of {', '.join(DTYPE_BYTES)}, got {named!r}")
            found = named or found
    return DTYPE_BYTES[found or "bfloat16"]


def _tied(fields: Fields, outer: Fields) -> bool | None:
    found = None
    for part in (fields, outer):
        if part.config.get("tie_word_embeddings") is not None:
            found = part.flag("tie_word_embeddings")
        part.read.add("tie_word_embeddings")
    return found


def _quantization(fields: Fields, outer: Fields, beside: Any, where: str) -> Quantization:
    expert_type = fields.get("expert_dtype")
    if expert_type not in (None, "fp4", "fp8"):
        raise fields.error("expert_dtype", f"expected fp4 or fp8, got {expert_type!r}")
    for part in (outer, fields):
        config = part.get("quantization_config")
        if config is not None:
            return read_quantization(config, expert_type, partial(part.error, "quantization_config"))
        part.get("compression_config")
    if beside is None:
        return NOT_QUANTISED

    def error(message: str) -> ValueError:
        return ValueError(f"{where}: hf_quant_config.json: {message}")

    if not isinstance(beside, Mapping) or not isinstance(beside.get("quantization"), dict):
        raise error("expected an object with quantization")
    return read_quantization({"quant_method": "modelopt", **beside["quantization"]}, expert_type, error)
