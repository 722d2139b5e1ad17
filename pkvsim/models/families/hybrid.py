"""Hybrids with layers that keep a state of constant size: Kimi Linear and K3, Qwen3-Next and 3.5, Nemotron-H.

Shapes as in Transformers 5.24 models/kimi_linear, qwen3_5 and nemotron_h, and Kimi K3's checkpoint.
"""
from __future__ import annotations

from dataclasses import replace

from pkvsim.models.config_fields import Fields
from pkvsim.models.families.attention import Heads, grouped, latent
from pkvsim.models.families.experts import chosen_experts, deepseek_experts, qwen_experts
from pkvsim.models.families.feed_forward import NUMBERED, PLAIN, Experts, dense, moe
from pkvsim.models.families.grouped import head_dim, kv_heads
from pkvsim.models.families.latent import latent_sizes
from pkvsim.models.families.layer_plan import LayerPlan, ModelPlan, Reading, layer_plan, prediction_head
from pkvsim.models.families.state import DeltaSizes, KimiDeltaSizes, MambaSizes, gated_delta, kimi_delta, mamba2

STATE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def read_kimi_linear(reading: Reading) -> ModelPlan:
    """Kimi Linear and K3: delta attention with a latent layer every fourth, experts in a narrower space in K3."""
    fields, layers, hidden, split = reading.fields, reading.num_layers, reading.hidden, reading.split
    sizes = replace(latent_sizes(fields), output_gate=fields.flag("mla_use_output_gate"))
    linear = fields.part("linear_attn_config")
    full = linear.get("full_attn_layers")
    kda = linear.get("kda_layers")
    numbers = range(1, layers + 1)
    lists = isinstance(full, list) and isinstance(kda, list) and all(isinstance(n, int) for n in [*full, *kda])
    if not lists or sorted([*full, *kda]) != list(numbers):
        raise linear.error("full_attn_layers", f"expected with kda_layers every one of layers 1 to {layers} once")
    delta = KimiDeltaSizes(
        num_heads=linear.integer("num_heads"), head_dim=linear.integer("head_dim"),
        conv_kernel=linear.integer("short_conv_kernel_size"), full_rank_gate=linear.flag("use_full_rank_gate"),
        conv_element_bytes=reading.element_bytes,
    )  # fmt: skip
    linear.finish()
    experts, sparse = deepseek_experts(fields, layers)
    experts = replace(
        experts,
        shared_width=fields.integer("num_shared_experts", 0, least=0) * experts.width,
        names=NUMBERED,
        latent=fields.integer("routed_expert_hidden_size", 0, least=0),
        latent_names=("routed_expert_down_proj", "routed_expert_up_proj"),
        latent_norm=fields.flag("latent_moe_use_norm"),
        latent_linear=False,  # K3's checkpoint has them in BF16 although its config does not except them
    )
    width = fields.integer("intermediate_size")
    residual = 4 if fields.integer("attn_res_block_size", 0, least=0) else 0
    plans = []
    for index in range(layers):
        name = f"layers.{index}"
        if index + 1 in full:
            attention = latent(split, f"{name}.self_attn", hidden, sizes)
        else:
            attention = kimi_delta(split, f"{name}.self_attn", hidden, delta)
        if sparse[index]:
            feed_forward = moe(split, f"{name}.block_sparse_moe", hidden, experts)
        else:
            feed_forward = dense(split, f"{name}.mlp", hidden, width)
        plans.append(layer_plan(attention, feed_forward, name, (2 + residual) * hidden))
    if fields.integer("num_nextn_predict_layers", 0, least=0):
        raise fields.error("num_nextn_predict_layers", "expected 0: this family's prediction heads are not described")
    return ModelPlan(layers=tuple(plans))


def read_qwen_hybrid(reading: Reading) -> ModelPlan:
    """Qwen3-Next and Qwen3.5: three gated delta nets to one gated full layer, dense or with experts."""
    fields, layers, hidden, split = reading.fields, reading.num_layers, reading.hidden, reading.split
    types = fields.choices("layer_types", layers, ("linear_attention", "full_attention"))
    interval = fields.integer("full_attention_interval", 4)
    full = [kind == "full_attention" for kind in types] if types else [
        (index + 1) % interval == 0 for index in range(layers)
    ]  # fmt: skip
    q_heads = fields.integer("num_attention_heads")
    biased = fields.flag("attention_bias")
    heads = Heads(
        num_q_heads=q_heads, num_kv_heads=kv_heads(fields, q_heads), head_dim=head_dim(fields, hidden, q_heads),
        norm="head", gate="element" if fields.flag("attn_output_gate", True) else "", qkv_bias=biased, out_bias=biased,
    )  # fmt: skip
    state_type = fields.get("mamba_ssm_dtype")
    if state_type is not None and (not isinstance(state_type, str) or state_type not in STATE_BYTES):
        raise fields.error("mamba_ssm_dtype", f"expected one of {', '.join(STATE_BYTES)}, got {state_type!r}")
    delta = DeltaSizes(
        key_heads=fields.integer("linear_num_key_heads"), value_heads=fields.integer("linear_num_value_heads"),
        key_dim=fields.integer("linear_key_head_dim"), value_dim=fields.integer("linear_value_head_dim"),
        conv_kernel=fields.integer("linear_conv_kernel_dim"),
        state_element_bytes=STATE_BYTES.get(str(state_type), reading.element_bytes),
        conv_element_bytes=reading.element_bytes,
    )  # fmt: skip
    fused = "Next" in fields.architecture
    has_experts = fields.get("num_experts") is not None
    experts, sparse = qwen_experts(fields, layers) if has_experts else (None, [False] * layers)
    fields.idle("no layer has experts", "mlp_only_layers", "decoder_sparse_step")
    width = 0 if all(sparse) else fields.integer("intermediate_size")
    fields.idle("every layer has experts instead", "intermediate_size")

    def layer(name: str, is_full: bool, is_sparse: bool) -> LayerPlan:
        if is_full:
            attention = grouped(split, f"{name}.self_attn", hidden, heads)
        else:
            attention = gated_delta(split, f"{name}.linear_attn", hidden, delta, fused=fused)
        if is_sparse and experts:
            feed_forward = moe(split, f"{name}.mlp", hidden, experts)
        else:
            feed_forward = dense(split, f"{name}.mlp", hidden, width)
        return layer_plan(attention, feed_forward, name, 2 * hidden)

    count = fields.integer("mtp_num_hidden_layers", 0, least=0)
    return ModelPlan(
        layers=tuple(layer(f"layers.{index}", full[index], sparse[index]) for index in range(layers)),
        mtp_layers=tuple(
            prediction_head(layer(f"mtp.layers.{at}", True, sparse[-1]), "mtp", hidden) for at in range(count)
        ),
    )


NEMOTRON_BLOCKS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
NEWER_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}  # Transformers from 5.20 on


def read_nemotron_h(reading: Reading) -> ModelPlan:
    """Nemotron-H and Nemotron 3 (arXiv 2504.03624): a block is a Mamba-2 mixer, attention, an MLP or experts."""
    fields, hidden, split = reading.fields, reading.hidden, reading.split
    blocks = _blocks(fields, "hybrid_override_pattern", "layers_block_type")
    if not blocks:
        raise fields.error("hybrid_override_pattern", "missing")
    layers = fields.integer("num_hidden_layers", len(blocks))
    if layers != len(blocks):
        raise fields.error("num_hidden_layers", f"expected {len(blocks)}, one for each block, got {layers}")
    q_heads = fields.integer("num_attention_heads")
    biased = fields.flag("attention_bias")
    size = fields.first_integer("head_dim", "attention_head_dim")
    heads = Heads(
        num_q_heads=q_heads, num_kv_heads=kv_heads(fields, q_heads), head_dim=size, qkv_bias=biased, out_bias=biased
    )
    fields.idle("no layer slides", "sliding_window")
    state_type = fields.get("mamba_ssm_cache_dtype")
    mamba = MambaSizes(
        num_heads=fields.integer("mamba_num_heads"), head_dim=fields.integer("mamba_head_dim"),
        groups=fields.integer("n_groups"), state_size=fields.integer("ssm_state_size"),
        conv_kernel=fields.integer("conv_kernel"), conv_bias=fields.flag("use_conv_bias", True),
        bias=fields.flag("mamba_proj_bias"),
        state_element_bytes=STATE_BYTES.get(str(state_type), reading.element_bytes),
        conv_element_bytes=reading.element_bytes,
    )  # fmt: skip
    fields.idle("the Mamba heads say it", "expand")
    fields.idle("how the scan is cut, not what it computes", "chunk_size")
    width, experts = 0, None
    if "mlp" in blocks:
        width = fields.integer("intermediate_size")
    fields.idle("no block is a dense MLP", "intermediate_size")
    if "moe" in blocks:
        count = fields.integer("n_routed_experts")
        experts = Experts(
            count=count, per_token=chosen_experts(fields, count, "num_experts_per_tok"),
            width=fields.integer("moe_intermediate_size"),
            shared_width=fields.integer("n_shared_experts", 0, least=0)
            * fields.integer("moe_shared_expert_intermediate_size", 0, least=0),
            names=PLAIN, shared_names=PLAIN, latent=fields.integer("moe_latent_size", 0, least=0),
        )  # fmt: skip
    mlp_bias = fields.flag("mlp_bias")

    def block(kind: str, at: str) -> LayerPlan:
        name = f"{at}.mixer"
        if kind == "mamba":
            return layer_plan(mamba2(split, name, hidden, mamba), None, at, hidden)
        if kind == "attention":
            return layer_plan(grouped(split, name, hidden, heads), None, at, hidden)
        if kind == "moe" and experts:
            return layer_plan(None, moe(split, name, hidden, experts), at, hidden)
        return layer_plan(None, dense(split, name, hidden, width, names=PLAIN, bias=mlp_bias), at, hidden)

    heads_count = fields.integer("num_nextn_predict_layers", 0, least=0)
    predictors = _blocks(fields, "mtp_hybrid_override_pattern", "mtp_layers_block_type") * heads_count
    plans = [block(kind, f"mtp.layers.{at}") for at, kind in enumerate(predictors)]
    if plans:
        plans[0] = prediction_head(plans[0], "mtp.layers.0", hidden)
    return ModelPlan(
        layers=tuple(block(kind, f"layers.{index}") for index, kind in enumerate(blocks)), mtp_layers=tuple(plans)
    )


def _blocks(fields: Fields, pattern_name: str, list_name: str) -> list[str]:
    """Kinds of blocks, from letters or from a list; empty where the config has neither."""
    pattern = fields.get(pattern_name)
    if pattern is not None:
        fields.idle(f"{pattern_name} says it", list_name)
        if not isinstance(pattern, str) or not pattern or set(pattern) - set(NEMOTRON_BLOCKS):
            raise fields.error(pattern_name, f"expected letters of {''.join(NEMOTRON_BLOCKS)}, got {pattern!r:.80}")
        return [NEMOTRON_BLOCKS[letter] for letter in pattern]
    kinds = fields.get(list_name, [])
    kinds = [NEWER_NAMES.get(kind, kind) for kind in kinds] if isinstance(kinds, list) else kinds
    known = set(NEMOTRON_BLOCKS.values())
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise fields.error(list_name, f"expected a list of {', '.join(sorted(known))}, got {kinds!r:.80}")
    return list(kinds)
