"""How configs describe routed experts, and which layers have them."""
from __future__ import annotations

from pkvsim.models.config_fields import Fields
from pkvsim.models.families.feed_forward import NUMBERED, Experts


def chosen_experts(fields: Fields, experts: int, *names: str) -> int:
    """Experts per token, from the first of `names` that the config has."""
    count = fields.first_integer(*names)
    if count > experts:
        found = next(name for name in names if fields.config.get(name) is not None)
        raise fields.error(found, f"expected at most the {experts} experts, got {count}")
    return count


def mixtral_experts(fields: Fields, layers: int) -> tuple[Experts, list[bool]]:
    """Experts of the dense width in every layer."""
    count, width = fields.integer("num_local_experts"), fields.integer("intermediate_size")
    per_token = chosen_experts(fields, count, "num_experts_per_tok")
    return Experts(count=count, per_token=per_token, width=width, names=NUMBERED), [True] * layers


def minimax_m2_experts(fields: Fields, layers: int) -> tuple[Experts, list[bool]]:
    """As Mixtral's, with fields that say what the family has anyway."""
    fields.idle("every layer has attention", "attn_type_list")
    fields.idle("per_layer: one weight for every element of all heads", "qk_norm_type", "use_qk_norm")
    fields.idle("num_mtp_modules says how many prediction heads there are", "use_mtp", "mtp_transformer_layers")
    return mixtral_experts(fields, layers)


def gpt_oss_experts(fields: Fields, layers: int) -> tuple[Experts, list[bool]]:
    """As Mixtral's, with biases on the router and on every expert."""
    count, width = fields.integer("num_local_experts"), fields.integer("intermediate_size")
    per_token = chosen_experts(fields, count, "num_experts_per_tok", "experts_per_token")
    experts = Experts(
        count=count, per_token=per_token, width=width, router="router", router_bias=True, bias=True,
    )  # fmt: skip
    return experts, [True] * layers


def qwen_experts(fields: Fields, layers: int) -> tuple[Experts, list[bool]]:
    """Qwen2, Qwen3 and their hybrids; a layer of mlp_only_layers has a dense MLP."""
    count = fields.first_integer("num_experts", "num_local_experts")
    width = fields.integer("moe_intermediate_size")
    per_token = chosen_experts(fields, count, "num_experts_per_tok")
    shared = fields.integer("shared_expert_intermediate_size", 0, least=0)
    only, step = fields.get("mlp_only_layers", []), fields.integer("decoder_sparse_step", 1)
    if not isinstance(only, list) or not all(isinstance(index, int) for index in only):
        raise fields.error("mlp_only_layers", f"expected a list of layers, got {only!r:.80}")
    fields.idle("query and key norms are part of the family", "use_qk_norm")
    experts = Experts(
        count=count, per_token=per_token, width=width, shared_width=shared, shared_name="shared_expert",
        shared_gate=shared > 0,
    )  # fmt: skip
    return experts, [index not in only and (index + 1) % step == 0 for index in range(layers)]


def deepseek_experts(fields: Fields, layers: int) -> tuple[Experts, list[bool]]:
    """DeepSeek's fields, which GLM and others have as well; the first layers are dense."""
    count = fields.first_integer("n_routed_experts", "num_experts", "num_local_experts")
    width = fields.integer("moe_intermediate_size")
    per_token = chosen_experts(fields, count, "num_experts_per_tok", "num_experts_per_token")
    shared = fields.integer("n_shared_experts", 0, least=0)
    types = fields.choices("mlp_layer_types", layers, ("dense", "sparse"))
    first, step = fields.integer("first_k_dense_replace", 0, least=0), fields.integer("moe_layer_freq", 1)
    if types is not None:
        sparse = [kind == "sparse" for kind in types]
    else:
        sparse = [index >= first and index % step == 0 for index in range(layers)]
    fields.idle("query and key norms are part of the family", "use_qk_norm")
    return Experts(count=count, per_token=per_token, width=width, shared_width=shared * width), sparse
