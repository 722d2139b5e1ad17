"""Families of grouped-query attention whose layers differ in heads or parts: Llama 4, Gemma 4, Step, MiniMax M3,
DeciLM."""
from __future__ import annotations

from dataclasses import replace

from pkvsim.models.config_fields import Fields
from pkvsim.models.families.attention import Heads, grouped
from pkvsim.models.families.experts import chosen_experts, deepseek_experts
from pkvsim.models.families.feed_forward import NUMBERED, Experts, dense, moe
from pkvsim.models.families.grouped import attention_kinds, head_dim, kv_heads
from pkvsim.models.families.layer_plan import LayerPlan, ModelPlan, Reading, layer_plan, prediction_head
from pkvsim.models.model_spec import CHUNKED, FULL, SLIDING
from pkvsim.models.modules import FIXED, MLP, Module


def read_llama4(reading: Reading) -> ModelPlan:
    """Llama 4: chunked layers with rotary positions, every fourth full and without; experts in some layers."""
    fields, layers, hidden, split = reading.fields, reading.num_layers, reading.hidden, reading.split
    q_heads = fields.integer("num_attention_heads")
    interval = fields.integer("no_rope_layer_interval", 4)
    fields.idle("norms of queries and keys have no weights here", "use_qk_norm")
    rotary = fields.get("no_rope_layers", []) or [int((index + 1) % interval != 0) for index in range(layers)]
    if not isinstance(rotary, list) or len(rotary) != layers:
        raise fields.error("no_rope_layers", f"expected {layers} of 0 or 1, got {rotary!r:.80}")
    chunk = fields.integer("attention_chunk_size", 0)
    fields.idle("no_rope_layers says which layers are chunked", "layer_types")
    heads = Heads(
        num_q_heads=q_heads, num_kv_heads=kv_heads(fields, q_heads), head_dim=head_dim(fields, hidden, q_heads),
        qkv_bias=fields.flag("attention_bias"), out_bias=fields.flag("attention_bias"),
    )  # fmt: skip
    count, width = fields.integer("num_local_experts"), fields.integer("intermediate_size")
    experts = Experts(
        count=count, per_token=chosen_experts(fields, count, "num_experts_per_tok"), width=width, shared_width=width,
        shared_name="shared_expert", router="router",
    )  # fmt: skip
    step = fields.integer("interleave_moe_layer_step", 1)
    named = fields.get("moe_layers")
    sparse = [index in named if named is not None else (index + 1) % step == 0 for index in range(layers)]
    plans = []
    for index in range(layers):
        name = f"layers.{index}"
        chunked = bool(rotary[index]) and chunk > 0
        attention = grouped(
            split, f"{name}.self_attn", hidden,
            replace(heads, kind=CHUNKED if chunked else FULL, window=chunk if chunked else 0),
        )  # fmt: skip
        if sparse[index]:
            feed_forward = moe(split, f"{name}.feed_forward", hidden, experts)
        else:
            feed_forward = dense(split, f"{name}.feed_forward", hidden, fields.integer("intermediate_size_mlp"))
        plans.append(layer_plan(attention, feed_forward, name, 2 * hidden))
    fields.idle("every layer has experts instead", "intermediate_size_mlp")
    return ModelPlan(layers=tuple(plans))


def read_gemma4(reading: Reading) -> ModelPlan:
    """Gemma 4: full layers have heads of their own, whose values may be their keys; experts beside a dense MLP.

    Shapes as in Transformers 5.24 models/gemma4.
    """
    fields, layers, hidden, split = reading.fields, reading.num_layers, reading.hidden, reading.split
    kinds, window = attention_kinds(fields, layers, "")
    q_heads = fields.integer("num_attention_heads")
    shared_values = fields.flag("attention_k_eq_v")
    sliding = Heads(
        num_q_heads=q_heads, num_kv_heads=kv_heads(fields, q_heads), head_dim=fields.integer("head_dim"), norm="head",
        kind=SLIDING, window=window, qkv_bias=fields.flag("attention_bias"), out_bias=fields.flag("attention_bias"),
    )  # fmt: skip
    full = replace(
        sliding, kind=FULL, window=0, head_dim=fields.integer("global_head_dim", sliding.head_dim),
        num_kv_heads=(
            kv_heads(fields, q_heads, "num_global_key_value_heads")
            if shared_values and fields.get("num_global_key_value_heads") is not None
            else sliding.num_kv_heads
        ),
        value_matrix=not shared_values,
    )  # fmt: skip
    fields.idle("keys and values have matrices of their own in every layer", "num_global_key_value_heads")
    width, experts = fields.integer("intermediate_size"), None
    if fields.flag("enable_moe_block"):
        count = fields.integer("num_experts")
        experts = Experts(
            count=count, per_token=chosen_experts(fields, count, "top_k_experts"),
            width=fields.first_integer("moe_intermediate_size", "expert_intermediate_size"),
            router="router.proj",
        )  # fmt: skip
    plans = []
    for index, kind in enumerate(kinds):
        name = f"layers.{index}"
        attention = grouped(split, f"{name}.self_attn", hidden, sliding if kind == SLIDING else full)
        spec, modules = dense(split, f"{name}.mlp", hidden, width)
        norms = 4
        if experts:
            dense_modules = modules
            spec, modules = moe(split, name, hidden, experts)
            spec = replace(spec, intermediate_size=width)
            scales = Module(name=f"{name}.router.scale", part=FIXED, vector=hidden + experts.count)
            modules, norms = [*dense_modules, *modules, scales], 7
        plans.append(layer_plan(attention, (spec, modules), name, norms * hidden))
    return ModelPlan(layers=tuple(plans), tied=True)


def read_step3p7(reading: Reading) -> ModelPlan:
    """Step 3.5 and 3.7: three sliding layers to a full one, a gate on every head, dense layers first."""
    fields, layers, hidden, split = reading.fields, reading.num_layers, reading.hidden, reading.split
    q_heads = fields.integer("num_attention_heads")
    heads = Heads(
        num_q_heads=q_heads, num_kv_heads=kv_heads(fields, q_heads), head_dim=head_dim(fields, hidden, q_heads),
        norm="head", gate="head",
    )  # fmt: skip
    kinds, window = attention_kinds(fields, layers, "")
    experts, sparse = deepseek_experts(fields, layers)
    experts = replace(
        experts, shared_width=fields.integer("share_expert_dim", experts.shared_width, least=0), router_bias=True
    )
    width = fields.integer("intermediate_size")

    def layer(index: int, kind: str, has_experts: bool) -> LayerPlan:
        name = f"layers.{index}"
        attention = grouped(
            split, f"{name}.self_attn", hidden, replace(heads, kind=kind, window=window if kind == SLIDING else 0)
        )
        if has_experts:
            return layer_plan(attention, moe(split, f"{name}.mlp", hidden, experts), name, 2 * hidden)
        return layer_plan(attention, dense(split, f"{name}.mlp", hidden, width), name, 2 * hidden)

    heads_count = fields.integer("num_nextn_predict_layers", 0, least=0)
    return ModelPlan(
        layers=tuple(layer(index, kinds[index], sparse[index]) for index in range(layers)),
        mtp_layers=tuple(
            prediction_head(layer(layers + at, SLIDING, False), f"layers.{layers + at}", hidden)
            for at in range(heads_count)
        ),
    )


def read_minimax_m3(reading: Reading) -> ModelPlan:
    """MiniMax M3: layers whose queries choose blocks of the cache by index heads of their own."""
    fields, layers, hidden, split = reading.fields, reading.num_layers, reading.hidden, reading.split
    q_heads = fields.integer("num_attention_heads")
    sparse = fields.choices("moe_layer_freq", layers, (0, 1)) or [1] * layers
    selection = fields.part("sparse_attention_config")
    selects = [0] * layers
    if selection.flag("use_sparse_attention"):
        selects = selection.choices("sparse_attention_freq", layers, (0, 1)) or [1] * layers
    index_heads, index_dim = selection.integer("sparse_num_index_heads"), selection.integer("sparse_index_dim")
    selected = selection.integer("sparse_topk_blocks") * selection.integer("sparse_block_size")
    selection.idle("sets which blocks are chosen, not how many", "sparse_score_type", "sparse_init_block",
                   "sparse_local_block", "sparse_disable_index_value")  # fmt: skip
    selection.finish()
    fields.idle("per_head: one weight per element of a head", "qk_norm_type", "use_qk_norm")
    heads = Heads(
        num_q_heads=q_heads, num_kv_heads=kv_heads(fields, q_heads), head_dim=head_dim(fields, hidden, q_heads),
        norm="head",
    )  # fmt: skip
    chooser = replace(heads, index_heads=index_heads, index_dim=index_dim, selected_entries=selected)
    count = fields.integer("num_local_experts")
    shared = fields.integer("n_shared_experts", 0, least=0) * fields.integer("shared_intermediate_size", 0, least=0)
    experts = Experts(
        count=count, per_token=chosen_experts(fields, count, "num_experts_per_tok"),
        width=fields.integer("intermediate_size"), shared_width=shared, names=NUMBERED,
    )  # fmt: skip

    def layer(index: int, has_experts: bool, chooses: bool) -> LayerPlan:
        name = f"layers.{index}"
        attention = grouped(split, f"{name}.self_attn", hidden, chooser if chooses else heads)
        if has_experts:
            return layer_plan(attention, moe(split, f"{name}.block_sparse_moe", hidden, experts), name, 2 * hidden)
        width = fields.integer("dense_intermediate_size")
        return layer_plan(attention, dense(split, f"{name}.mlp", hidden, width), name, 2 * hidden)

    heads_count = fields.integer("num_mtp_modules", 0, least=0)
    return ModelPlan(
        layers=tuple(layer(index, bool(sparse[index]), bool(selects[index])) for index in range(layers)),
        mtp_layers=tuple(
            prediction_head(layer(layers + at, True, bool(selects[-1])), f"layers.{layers + at}", hidden)
            for at in range(heads_count)
        ),
    )


def read_decilm(reading: Reading) -> ModelPlan:
    """Nemotron models found by architecture search (arXiv 2411.19146): every layer has sizes of its own, or a part
    replaced by a matrix or left out. Widths as modeling_decilm.py rounds them."""
    fields, layers, hidden, split = reading.fields, reading.num_layers, reading.hidden, reading.split
    q_heads = fields.integer("num_attention_heads")
    size = head_dim(fields, hidden, q_heads)
    blocks = fields.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) != layers or not all(isinstance(block, dict) for block in blocks):
        raise fields.error("block_configs", f"expected {layers} objects")
    biased, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
    plans = []
    for index, block in enumerate(blocks):
        name = f"layers.{index}"
        own = Fields(block, f"{fields.where}: block_configs[{index}]", fields.architecture)
        mixer, mlp = own.part("attention"), own.part("ffn")
        attention = feed_forward = None
        norms = 0
        if mixer.flag("replace_with_linear"):
            attention = None
            feed_forward_extra = [
                Module(name=f"{name}.self_attn.linear_attn", part=MLP, out_features=hidden, in_features=hidden,
                       share=1 / split.parallel)
            ]  # fmt: skip
            norms += hidden
        else:
            feed_forward_extra = []
            if not mixer.flag("no_op"):
                group = mixer.integer("n_heads_in_group")
                window = mixer.integer("window_length", 0)
                attention = grouped(
                    split, f"{name}.self_attn", hidden,
                    Heads(
                        num_q_heads=q_heads, num_kv_heads=q_heads // group, head_dim=size, qkv_bias=biased,
                        out_bias=biased, kind=SLIDING if window else FULL, window=window,
                    ),
                )  # fmt: skip
                norms += hidden
        if mlp.flag("replace_with_linear"):
            feed_forward_extra.append(
                Module(name=f"{name}.mlp.linear_mlp", part=MLP, out_features=hidden, in_features=hidden,
                       share=1 / split.parallel)
            )  # fmt: skip
            norms += hidden
        elif not mlp.flag("no_op"):
            width = 2 * mlp.number("ffn_mult") * hidden / 3
            feed_forward = dense(split, f"{name}.mlp", hidden, -(-int(width) // 256) * 256, bias=mlp_bias)
            norms += hidden
        own.idle("the layer is left out or replaced", "parallel_blocks")
        for part in (mixer, mlp):
            part.idle("the part is left out or replaced", "n_heads_in_group", "window_length", "ffn_mult", "no_op")
            part.idle("sinks need no weights", "unshifted_sink", "use_prefill_window_in_sink_attention")
            part.finish()
        plan = layer_plan(attention, feed_forward, name, norms)
        plans.append(replace(plan, modules=(*plan.modules, *feed_forward_extra)))
    fields.idle("block_configs says it layer by layer", "intermediate_size", "num_key_value_heads")
    return ModelPlan(layers=tuple(plans))
