"""Families with latent or compressed attention: DeepSeek V2 to V4, Kimi K2, GLM-5.

Shapes as in Transformers 5.24 models/deepseek_v3, deepseek_v32, glm_moe_dsa and deepseek_v4.
"""
from __future__ import annotations

from dataclasses import replace

from pkvsim.models.config_fields import Fields
from pkvsim.models.families.attention import CompressedSizes, LatentSizes, compressed, latent
from pkvsim.models.families.experts import deepseek_experts
from pkvsim.models.families.feed_forward import NUMBERED, dense, moe
from pkvsim.models.families.layer_plan import LayerPlan, ModelPlan, Reading, layer_plan, prediction_head
from pkvsim.models.modules import FIXED, Module


def latent_sizes(fields: Fields) -> LatentSizes:
    """The sizes of multi-head latent attention, without an indexer."""
    fields.idle("the latent sizes say it", "head_dim", "qk_head_dim", "num_key_value_heads")
    return LatentSizes(
        num_heads=fields.integer("num_attention_heads"),
        q_rank=fields.integer("q_lora_rank", 0, least=0),
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        value_dim=fields.integer("v_head_dim"),
        bias=fields.flag("attention_bias"),
    )


def read_deepseek(reading: Reading) -> ModelPlan:
    """DeepSeek V2, V3, V3.2 and what is built like them: Kimi K2, GLM-5 (whose layers may share a selection)."""
    fields, layers, hidden, split = reading.fields, reading.num_layers, reading.hidden, reading.split
    sizes = latent_sizes(fields)
    experts, sparse = deepseek_experts(fields, layers)
    owns_index = [False] * layers
    if fields.get("index_topk") is not None:
        sizes = replace(
            sizes, index_heads=fields.integer("index_n_heads"), index_dim=fields.integer("index_head_dim"),
            selected_entries=fields.integer("index_topk"),
        )  # fmt: skip
        types = fields.choices("indexer_types", layers, ("full", "shared"))
        owns_index = [kind == "full" for kind in types] if types else [True] * layers
        fields.idle("indexer_types says which layers have an indexer" if types else "every layer has an indexer",
                    "index_topk_freq", "index_skip_topk_offset", "index_topk_pattern")  # fmt: skip
    fields.choices("layer_types", layers, ("full_attention", "indexed_attention"))
    width = 0 if all(sparse) else fields.integer("intermediate_size")
    fields.idle("every layer has experts instead", "intermediate_size")

    def layer(index: int, has_experts: bool, has_index: bool) -> LayerPlan:
        name = f"layers.{index}"
        own = sizes if has_index else replace(sizes, index_heads=0, index_dim=0)
        attention = latent(split, f"{name}.self_attn", hidden, own)
        if has_experts:
            return layer_plan(attention, moe(split, f"{name}.mlp", hidden, experts), name, 2 * hidden)
        return layer_plan(attention, dense(split, f"{name}.mlp", hidden, width), name, 2 * hidden)

    heads = fields.integer("num_nextn_predict_layers", 0, least=0)
    return ModelPlan(
        layers=tuple(layer(index, sparse[index], owns_index[index]) for index in range(layers)),
        mtp_layers=tuple(
            prediction_head(layer(layers + at, True, any(owns_index)), f"layers.{layers + at}", hidden)
            for at in range(heads)
        ),
    )


def read_deepseek_v4(reading: Reading) -> ModelPlan:
    """DeepSeek V4: windows with compressed entries behind them, four residual streams, experts in every layer."""
    fields, layers, hidden, split = reading.fields, reading.num_layers, reading.hidden, reading.split
    ratios = fields.get("compress_ratios")
    if not isinstance(ratios, list) or len(ratios) < layers or not all(isinstance(n, int) and n >= 0 for n in ratios):
        raise fields.error("compress_ratios", f"expected at least {layers} whole numbers")
    if fields.integer("num_key_value_heads", 1) != 1:
        raise fields.error("num_key_value_heads", "expected 1, the vector that all query heads share")
    sizes = CompressedSizes(
        num_heads=fields.integer("num_attention_heads"), head_dim=fields.integer("head_dim"),
        q_rank=fields.integer("q_lora_rank"), o_rank=fields.integer("o_lora_rank"),
        o_groups=fields.integer("o_groups"), window=fields.integer("sliding_window"), ratio=0,
        index_heads=fields.integer("index_n_heads"), index_dim=fields.integer("index_head_dim"),
        selected_entries=fields.integer("index_topk"),
    )  # fmt: skip
    fields.idle("part of head_dim", "qk_rope_head_dim")
    fields.idle("false: no biases", "attention_bias")
    fields.idle("layers whose router is a table of token ids", "num_hash_layers")
    experts, _ = deepseek_experts(fields, layers)
    experts = replace(experts, names=NUMBERED, shared_names=NUMBERED)
    streams = fields.integer("hc_mult")
    mixing = (2 + streams) * streams

    def layer(index: int, ratio: int, name: str) -> LayerPlan:
        own = replace(sizes, ratio=ratio)
        if ratio != 4:  # longer ratios leave so few entries that all are read
            own = replace(own, index_heads=0, index_dim=0, selected_entries=0)
        plan = layer_plan(
            compressed(split, f"{name}.attn", hidden, own), moe(split, f"{name}.ffn", hidden, experts), name, 2 * hidden
        )
        mixers = tuple(
            Module(name=f"{name}.{part}", part=FIXED, out_features=mixing, in_features=streams * hidden,
                   vector=mixing + 3, linear=False)
            for part in ("hc_attn", "hc_ffn")
        )  # fmt: skip
        return replace(plan, modules=(*plan.modules, *mixers))

    heads = fields.integer("num_nextn_predict_layers", 0, least=0)
    return ModelPlan(
        layers=tuple(layer(index, ratios[index], f"layers.{index}") for index in range(layers)),
        mtp_layers=tuple(prediction_head(layer(layers, 0, f"mtp.{at}"), f"mtp.{at}", hidden) for at in range(heads)),
        extra=(
            Module(name="hc_head", part=FIXED, out_features=streams, in_features=streams * hidden,
                   vector=streams + 1, linear=False),
        ),
        notes=("open windows of compressed attention are counted in float32, which is an assumption",),
    )  # fmt: skip
