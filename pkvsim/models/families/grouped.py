"""Families whose layers are all grouped-query attention alike but for windows: Llama, Mistral, Qwen, Gemma, GPT-OSS."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pkvsim.models.config_fields import Fields
from pkvsim.models.families.attention import Heads, grouped
from pkvsim.models.families.experts import (
    deepseek_experts,
    gpt_oss_experts,
    minimax_m2_experts,
    mixtral_experts,
    qwen_experts,
)
from pkvsim.models.families.feed_forward import Experts, dense, moe
from pkvsim.models.families.layer_plan import LayerPlan, ModelPlan, Reading, layer_plan, prediction_head
from pkvsim.models.model_spec import CHUNKED, FULL, SLIDING

KINDS = {"full_attention": FULL, "sliding_attention": SLIDING, "chunked_attention": CHUNKED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What a family does that its configs do not say. `experts` reads them and which layers have them."""

    bias: str = "config"  # of query, key and value: config (attention_bias, the output too), qkv, none
    norm: str = ""  # of queries and keys, as in Heads
    norms: int = 2  # of a layer, each of the hidden size; more before and after in Gemma 2 and 3
    slides: str = ""  # without layer_types: "" none, all, qwen, even, gemma3
    sinks: bool = False
    mlp_bias: str = "mlp_bias"  # the field that says so; empty: none
    experts: Callable[[Fields, int], tuple[Experts, list[bool]]] | None = None
    expert_mlp: str = "mlp"
    tied: bool = False
    soft_cap: str = ""  # the field with it
    mtp: str = ""  # the field with the number of prediction heads


def read_grouped(reading: Reading, style: Style) -> ModelPlan:
    """A family that `style` describes."""
    fields, layers, hidden = reading.fields, reading.num_layers, reading.hidden
    q_heads = fields.integer("num_attention_heads")
    kinds, window = attention_kinds(fields, layers, style.slides)
    biased = style.bias == "config" and fields.flag("attention_bias")
    heads = Heads(
        num_q_heads=q_heads,
        num_kv_heads=kv_heads(fields, q_heads),
        head_dim=head_dim(fields, hidden, q_heads),
        qkv_bias=biased or (style.bias == "qkv" and fields.flag("qkv_bias", True)),
        out_bias=biased,
        norm=style.norm,
        soft_cap=fields.number(style.soft_cap) if style.soft_cap else 0.0,
        sinks=style.sinks,
    )
    if style.bias == "qkv":
        fields.idle("this family has biases on queries, keys and values alone", "attention_bias")
    experts, sparse = style.experts(fields, layers) if style.experts else (None, [False] * layers)
    width = 0 if all(sparse) else fields.integer("intermediate_size")
    fields.idle("every layer has experts instead", "intermediate_size")
    mlp_bias = fields.flag(style.mlp_bias) if style.mlp_bias else False

    def layer(index: int, kind: str, has_experts: bool) -> LayerPlan:
        name = f"layers.{index}"
        attention = grouped(
            reading.split, f"{name}.self_attn", hidden,
            replace(heads, kind=kind, window=0 if kind == FULL else window),
        )  # fmt: skip
        if has_experts and experts:
            feed_forward = moe(reading.split, f"{name}.{style.expert_mlp}", hidden, experts)
        else:
            feed_forward = dense(reading.split, f"{name}.mlp", hidden, width, bias=mlp_bias)
        return layer_plan(attention, feed_forward, name, style.norms * hidden)

    heads_count = fields.integer(style.mtp, 0, least=0) if style.mtp else 0
    return ModelPlan(
        layers=tuple(layer(index, kinds[index], sparse[index]) for index in range(layers)),
        mtp_layers=tuple(
            prediction_head(layer(layers + at, FULL, sparse[-1]), f"layers.{layers + at}", hidden)
            for at in range(heads_count)
        ),
        tied=style.tied,
    )


def kv_heads(fields: Fields, q_heads: int, name: str = "num_key_value_heads") -> int:
    """KV heads; as many as query heads where the config has none."""
    count = fields.integer(name, q_heads)
    if q_heads % count:
        raise fields.error(name, f"expected a divisor of {q_heads} query heads, got {count}")
    return count


def head_dim(fields: Fields, hidden: int, q_heads: int) -> int:
    if fields.get("head_dim") is None and hidden % q_heads:
        raise fields.error("head_dim", f"missing, and hidden_size {hidden} is no multiple of {q_heads} heads")
    return fields.integer("head_dim", max(1, hidden // q_heads))


def attention_kinds(fields: Fields, layers: int, slides: str) -> tuple[list[str], int]:
    """(kind of every layer, window of those that are not full)."""
    types = fields.choices("layer_types", layers, tuple(KINDS))
    if types is not None:
        fields.idle("layer_types says which layers slide", "use_sliding_window", "max_window_layers",
                    "sliding_window_pattern", "full_attention_interval")  # fmt: skip
        kinds = [KINDS[kind] for kind in types]
    elif slides == "all":
        kinds = [SLIDING if fields.get("sliding_window") is not None else FULL] * layers
    elif slides == "qwen" and fields.flag("use_sliding_window"):
        first = fields.integer("max_window_layers", least=0)
        kinds = [SLIDING if index >= first else FULL for index in range(layers)]
    elif slides == "even":
        kinds = [FULL if index % 2 else SLIDING for index in range(layers)]
    elif slides == "gemma3":
        period = fields.integer("sliding_window_pattern", 6)
        kinds = [SLIDING if (index + 1) % period else FULL for index in range(layers)]
    else:
        kinds = [FULL] * layers
    if CHUNKED in kinds:
        window = fields.integer("attention_chunk_size")
    elif SLIDING in kinds:
        window = fields.integer("sliding_window")
    else:
        window = 0
    if types is not None or slides:  # elsewhere a window is a field that is not understood
        fields.idle("no layer slides", "sliding_window", "max_window_layers", "use_sliding_window",
                    "attention_chunk_size")  # fmt: skip
    return kinds, window


STYLES: dict[str, Style] = {
    "LlamaForCausalLM": Style(),
    "MistralForCausalLM": Style(slides="all"),
    "Ministral3ForCausalLM": Style(slides="all"),
    "MixtralForCausalLM": Style(slides="all", experts=mixtral_experts, expert_mlp="block_sparse_moe"),
    "Qwen2ForCausalLM": Style(bias="qkv", slides="qwen"),
    "Qwen2MoeForCausalLM": Style(bias="qkv", slides="qwen", experts=qwen_experts),
    "Qwen3ForCausalLM": Style(norm="head", slides="qwen"),
    "Qwen3MoeForCausalLM": Style(norm="head", slides="qwen", experts=qwen_experts),
    "Qwen3VLForConditionalGeneration": Style(norm="head"),
    "Qwen3VLMoeForConditionalGeneration": Style(norm="head", experts=qwen_experts),
    "Qwen2_5_VLForConditionalGeneration": Style(bias="qkv", slides="qwen"),
    "Qwen2VLForConditionalGeneration": Style(bias="qkv", slides="qwen"),
    "MiMoForCausalLM": Style(bias="qkv", slides="qwen", mtp="num_nextn_predict_layers"),
    "GptOssForCausalLM": Style(slides="even", sinks=True, experts=gpt_oss_experts),
    "MiniMaxM2ForCausalLM": Style(
        bias="none", norm="all", experts=minimax_m2_experts, expert_mlp="block_sparse_moe", mtp="num_mtp_modules"
    ),
    "GemmaForCausalLM": Style(tied=True),
    "Gemma2ForCausalLM": Style(norms=4, slides="even", soft_cap="attn_logit_softcapping", tied=True),
    "Gemma3ForCausalLM": Style(
        norm="head", norms=4, slides="gemma3", soft_cap="attn_logit_softcapping", tied=True
    ),
    "Gemma3ForConditionalGeneration": Style(
        norm="head", norms=4, slides="gemma3", soft_cap="attn_logit_softcapping", tied=True
    ),
    "Phi3ForCausalLM": Style(slides="all"),
    "Glm4ForCausalLM": Style(bias="qkv", norms=4),
    "Glm4MoeForCausalLM": Style(bias="qkv", experts=deepseek_experts, mtp="num_nextn_predict_layers"),
    "SmolLM3ForCausalLM": Style(),
    "SeedOssForCausalLM": Style(bias="qkv"),
    "Olmo2ForCausalLM": Style(norm="all"),
    "Olmo3ForCausalLM": Style(norm="all"),
    "GraniteForCausalLM": Style(),
}


def read_glm4_moe(reading: Reading) -> ModelPlan:
    """GLM-4.5 to 4.7: norms of queries and keys and biases where the config says so."""
    fields = reading.fields
    norm = "head" if fields.flag("use_qk_norm") else ""
    bias = "qkv" if fields.flag("attention_bias") else "none"
    return read_grouped(reading, replace(STYLES["Glm4MoeForCausalLM"], norm=norm, bias=bias))


def read_seed_oss(reading: Reading) -> ModelPlan:
    """Biases on queries, keys and values, and another flag for the output."""
    reading.fields.idle("attention_bias is read, the output has none", "attention_out_bias", "residual_dropout")
    return read_grouped(reading, STYLES["SeedOssForCausalLM"])
