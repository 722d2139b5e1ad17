"""Parameters, bytes and FLOPs of any config of a family against a plain sum over its named tensors."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim.models.hugging_face import model_from_config
from pkvsim.models.model_costs import (
    active_weights,
    decode_attention_flops,
    decode_read_bytes,
    decode_weight_bytes,
    flops_per_token,
    growing_kv_bytes_per_token,
    kv_bytes,
    kv_bytes_per_token,
    mtp_weights,
    prefill_attention_flops,
    state_bytes,
    total_weights,
    weight_bytes,
)

SMALL, MANY = st.integers(1, 4), st.integers(1, 6)
DIMS = st.sampled_from([8, 16, 40])


def read(config, **options):
    return model_from_config(config, name="m", source="s", where="config.json", **options)


@st.composite
def grouped_configs(draw):
    kv = draw(SMALL)
    config = {
        "architectures": [draw(st.sampled_from(["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
                                                "Qwen3MoeForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM"]))],
        "hidden_size": draw(DIMS), "num_hidden_layers": draw(MANY), "num_key_value_heads": kv,
        "num_attention_heads": kv * draw(SMALL), "head_dim": draw(DIMS), "intermediate_size": draw(DIMS),
        "vocab_size": draw(st.integers(2, 50)), "max_position_embeddings": 100,
        "tie_word_embeddings": draw(st.booleans()),
    }  # fmt: skip
    family = config["architectures"][0]
    if family in ("LlamaForCausalLM", "GptOssForCausalLM"):
        config["attention_bias"] = draw(st.booleans())
    if family == "GptOssForCausalLM":
        config["sliding_window"] = draw(st.integers(1, 60))
    if family == "Qwen3MoeForCausalLM":
        config["moe_intermediate_size"] = draw(DIMS)
    if family in ("Qwen3MoeForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM"):
        count = draw(st.integers(1, 6))
        config["num_experts" if "Qwen" in family else "num_local_experts"] = count
        config["num_experts_per_tok"] = draw(st.integers(1, count))
    return config


def grouped_tensors(c):
    """(shape, a token multiplies with it) of every tensor."""
    family, h = c["architectures"][0], c["hidden_size"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    yield (c["vocab_size"], h), c["tie_word_embeddings"]
    if not c["tie_word_embeddings"]:
        yield (c["vocab_size"], h), True
    yield (h,), False
    for _ in range(c["num_hidden_layers"]):
        yield from [((q, h), True), ((kv, h), True), ((kv, h), True), ((h, q), True), ((h,), False), ((h,), False)]
        if family == "Qwen2ForCausalLM" or c.get("attention_bias"):
            yield from [((q,), False), ((kv,), False), ((kv,), False)]
        if c.get("attention_bias"):
            yield (h,), False
        if family.startswith("Qwen3"):
            yield from [((c["head_dim"],), False)] * 2
        if family == "GptOssForCausalLM":
            yield (c["num_attention_heads"],), False
        width = c.get("moe_intermediate_size", c["intermediate_size"])
        experts = c.get("num_experts", c.get("num_local_experts"))
        if experts is None:
            yield from [((width, h), True), ((width, h), True), ((h, width), True)]
            continue
        yield (experts, h), True
        for expert in range(experts):
            used = expert < c["num_experts_per_tok"]
            yield from [((width, h), used), ((width, h), used), ((h, width), used)]
            if family == "GptOssForCausalLM":
                yield from [((width,), False), ((width,), False), ((h,), False)]
        if family == "GptOssForCausalLM":
            yield (experts,), False


def total(tensors):
    return sum(math.prod(shape) for shape, _ in tensors)


def multiplied(tensors):
    return sum(2 * math.prod(shape) for shape, used in tensors if used)


@given(grouped_configs())
@settings(deadline=None)
def test_grouped_query_models(config):
    model, tensors = read(config), list(grouped_tensors(config))
    assert total_weights(model).parameters == total(tensors)
    assert weight_bytes(model) == 2 * total(tensors)
    assert flops_per_token(model) == multiplied(tensors)
    layers, kv, dim = config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"]
    assert kv_bytes_per_token(model) == layers * 2 * kv * dim * 2
    touched = decode_weight_bytes(model, np.array([1, 7, 1000]))
    assert (np.diff(touched) > 0).all()
    everything = weight_bytes(model) + (model.lm_head.bytes if model.tied_embeddings else 0)
    assert touched[2] <= everything + 1000 * model.embedding.bytes / model.vocab_size


@given(grouped_configs(), st.sampled_from([2, 3, 4, 8]))
@settings(deadline=None)
def test_shares_of_a_grouped_query_model(config, parallel):
    """Every KV head is somewhere, no GPU has less than its part, and without copies the parts make the whole."""
    whole = read(config)
    q, kv = config["num_attention_heads"], config["num_key_value_heads"]
    if q % parallel or (kv % parallel and parallel % kv):
        with pytest.raises(ValueError, match="tensor_parallel: expected a divisor"):
            read(config, tensor_parallel=parallel)
        return
    share = read(config, tensor_parallel=parallel)
    assert share.num_kv_heads * parallel >= kv and share.num_q_heads * parallel == q
    assert kv_bytes_per_token(share) * parallel == kv_bytes_per_token(whole) * max(1, parallel // kv)
    norms = sum(layer.norms_and_router.bytes for layer in whole.layers) + whole.final_norm.bytes
    if kv % parallel == 0:
        assert weight_bytes(share) * parallel == pytest.approx(weight_bytes(whole) + (parallel - 1) * norms)
    else:
        assert weight_bytes(share) * parallel > weight_bytes(whole)


@st.composite
def latent_configs(draw):
    layers, experts = draw(MANY), draw(st.integers(1, 6))
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": draw(DIMS), "num_hidden_layers": layers,
        "num_attention_heads": draw(SMALL), "q_lora_rank": draw(st.sampled_from([None, 8, 24])),
        "kv_lora_rank": draw(DIMS), "qk_nope_head_dim": draw(DIMS), "qk_rope_head_dim": draw(DIMS),
        "v_head_dim": draw(DIMS), "intermediate_size": draw(DIMS), "moe_intermediate_size": draw(DIMS),
        "n_routed_experts": experts, "num_experts_per_tok": draw(st.integers(1, experts)),
        "n_shared_experts": draw(st.integers(0, 2)), "first_k_dense_replace": draw(st.integers(0, layers)),
        "num_nextn_predict_layers": draw(st.integers(0, 1)), "vocab_size": 10, "max_position_embeddings": 100,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if draw(st.booleans()):
        config |= {"index_topk": draw(st.integers(1, 50)), "index_n_heads": draw(SMALL), "index_head_dim": draw(DIMS)}
    return config


def latent_layer(c, sparse):
    h, heads = c["hidden_size"], c["num_attention_heads"]
    qk = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    if c["q_lora_rank"]:
        yield from [((c["q_lora_rank"], h), True), ((c["q_lora_rank"],), False)]
    yield (heads * qk, c["q_lora_rank"] or h), True
    yield from [((c["kv_lora_rank"] + c["qk_rope_head_dim"], h), True), ((c["kv_lora_rank"],), False)]
    yield (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"]), True
    yield from [((h, heads * c["v_head_dim"]), True), ((h,), False), ((h,), False)]
    if "index_topk" in c:
        index = c["index_n_heads"] * c["index_head_dim"]
        yield from [((index, c["q_lora_rank"] or h), True), ((c["index_head_dim"], h), True)]
        yield from [((c["index_head_dim"],), False)] * 2
        yield (c["index_n_heads"], h), True
    if not sparse:
        yield from [((c["intermediate_size"], h), True)] * 3
        return
    yield (c["n_routed_experts"], h), True
    for expert in range(c["n_routed_experts"]):
        yield from [((c["moe_intermediate_size"], h), expert < c["num_experts_per_tok"])] * 3
    yield from [((c["n_shared_experts"] * c["moe_intermediate_size"], h), True)] * 3


@given(latent_configs())
@settings(deadline=None)
def test_latent_models(config):
    model, h = read(config), config["hidden_size"]
    tensors = [((10, h), False), ((10, h), True), ((h,), False)]
    for layer in range(config["num_hidden_layers"]):
        tensors += latent_layer(config, layer >= config["first_k_dense_replace"])
    assert total_weights(model).parameters == total(tensors)
    assert flops_per_token(model) == multiplied(tensors)
    heads = list(latent_layer(config, True)) if config["num_nextn_predict_layers"] else []
    extra = [((h, 2 * h), True), ((3 * h,), False)] if heads else []
    assert mtp_weights(model).parameters == total([*heads, *extra])
    index = config["index_head_dim"] + 4 if "index_topk" in config else 0
    latent = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    assert kv_bytes_per_token(model) == config["num_hidden_layers"] * (2 * latent + index)


@given(
    st.lists(st.booleans(), min_size=1, max_size=6), DIMS, SMALL, SMALL, SMALL, DIMS, DIMS, st.integers(1, 4),
    st.booleans(),
)  # fmt: skip
@settings(deadline=None)
def test_delta_net_hybrids(full, h, kv, key_heads, value_groups, key_dim, dim, kernel, gated):
    values = key_heads * value_groups
    config = {
        "architectures": ["Qwen3_5ForCausalLM"], "hidden_size": h, "num_hidden_layers": len(full), "head_dim": dim,
        "layer_types": ["full_attention" if one else "linear_attention" for one in full], "num_attention_heads": 2 * kv,
        "num_key_value_heads": kv, "linear_num_key_heads": key_heads, "linear_num_value_heads": values,
        "linear_key_head_dim": key_dim, "linear_value_head_dim": dim, "linear_conv_kernel_dim": kernel,
        "intermediate_size": 24, "vocab_size": 10, "max_position_embeddings": 100, "attn_output_gate": gated,
        "mamba_ssm_dtype": "float32",
    }  # fmt: skip
    model = read(config)
    tensors = [((10, h), False), ((10, h), True), ((h,), False)]
    channels = 2 * key_heads * key_dim + values * dim
    for one in full:
        tensors += [((24, h), True)] * 3 + [((h,), False)] * 2
        if one:
            tensors += [(((1 + gated) * 2 * kv * dim, h), True), ((kv * dim, h), True), ((kv * dim, h), True)]
            tensors += [((h, 2 * kv * dim), True), ((dim,), False), ((dim,), False)]
        else:
            tensors += [((channels, h), True), ((values * dim, h), True), ((values, h), True), ((values, h), True)]
            tensors += [((channels, kernel), True), ((values,), False), ((values,), False), ((dim,), False)]
            tensors += [((h, values * dim), True)]
    assert total_weights(model).parameters == total(tensors)
    assert flops_per_token(model) == multiplied(tensors)
    state = values * key_dim * dim * 4 + channels * (kernel - 1) * 2
    assert state_bytes(model) == state * full.count(False)
    assert kv_bytes_per_token(model) == full.count(True) * 2 * kv * dim * 2


@given(st.text("M*-E", min_size=1, max_size=8), DIMS, SMALL, SMALL, DIMS, st.integers(1, 4), st.sampled_from([0, 12]))
@settings(deadline=None)
def test_mamba_hybrids(pattern, h, kv, groups, size, kernel, latent):
    config = {
        "architectures": ["NemotronHForCausalLM"], "hidden_size": h, "hybrid_override_pattern": pattern,
        "num_attention_heads": 3 * kv, "num_key_value_heads": kv, "head_dim": 8, "mamba_num_heads": 6,
        "mamba_head_dim": 4, "n_groups": groups, "ssm_state_size": size, "conv_kernel": kernel, "use_conv_bias": True,
        "intermediate_size": 20, "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28,
        "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 36, "moe_latent_size": latent, "vocab_size": 10,
        "max_position_embeddings": 100, "tie_word_embeddings": False,
    }  # fmt: skip
    if "E" not in pattern:
        config = {key: value for key, value in config.items() if "moe" not in key and "expert" not in key}
    model = read(config)
    tensors = [((10, h), False), ((10, h), True), ((h,), False)]
    channels = 24 + 2 * groups * size
    for letter in pattern:
        tensors.append(((h,), False))
        if letter == "M":
            tensors += [((24 + channels + 6, h), True), ((channels, kernel), True), ((channels,), False)]
            tensors += [((6,), False)] * 3 + [((24,), False), ((h, 24), True)]
        elif letter == "*":
            tensors += [((24 * kv, h), True), ((8 * kv, h), True), ((8 * kv, h), True), ((h, 24 * kv), True)]
        elif letter == "-":
            tensors += [((20, h), True), ((h, 20), True)]
        else:
            tensors += [((5, h), True), ((36, h), True), ((h, 36), True)]
            tensors += [((28, latent or h), expert < 2) for expert in range(5) for _ in range(2)]
            tensors += [((latent, h), True)] * 2
    assert total_weights(model).parameters == total(tensors)
    assert flops_per_token(model) == multiplied(tensors)
    assert state_bytes(model) == pattern.count("M") * (6 * 4 * size + channels * (kernel - 1)) * 2
    assert kv_bytes_per_token(model) == pattern.count("*") * 2 * kv * 8 * 2


KINDS = st.sampled_from(["full_attention", "sliding_attention", "chunked_attention"])


CONTEXTS = st.lists(st.integers(1, 200), min_size=1, max_size=4)


@given(st.lists(KINDS, min_size=1, max_size=4), st.integers(1, 40), CONTEXTS)
@settings(deadline=None)
def test_windows_bound_cache_and_work(kinds, window, contexts):
    """The cache of a sequence grows by one token at a time where no window is full, and never beyond its windows."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_hidden_layers": len(kinds), "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16, "vocab_size": 10,
        "max_position_embeddings": 1000, "layer_types": kinds, "sliding_window": window, "attention_chunk_size": window,
    }  # fmt: skip
    model, layer = read(config), 2 * 2 * 8 * 2
    for context in contexts:
        seen = {
            "full_attention": context,
            "sliding_attention": min(context, window),
            "chunked_attention": (context - 1) % window + 1,
        }
        entries = sum(seen[kind] for kind in kinds)
        assert kv_bytes(model, context) == layer * entries == decode_read_bytes(model, [context])
        assert decode_attention_flops(model, [context]) == 4 * 4 * 8 * entries
    begin, chunk = contexts[0], contexts[-1]
    steps = sum(decode_attention_flops(model, [seen]) for seen in range(begin + 1, begin + chunk + 1))
    assert prefill_attention_flops(model, begin, chunk) == steps
    assert growing_kv_bytes_per_token(model) == layer * kinds.count("full_attention")


@given(latent_configs(), st.integers(0, 300), st.integers(1, 100))
@settings(deadline=None)
def test_latent_work(config, begin, chunk):
    """Decode attends in the latent space, prefill with expanded heads; a selection bounds both, its scores neither."""
    model, layers, heads = read(config), config["num_hidden_layers"], config["num_attention_heads"]
    latent, value = config["kv_lora_rank"] + config["qk_rope_head_dim"], config["kv_lora_rank"]
    most = config.get("index_topk", 10**9)
    index = config.get("index_n_heads", 0) * config.get("index_head_dim", 0)
    context = begin + chunk
    scores = 2 * index * context
    attended = 2 * heads * (latent + value) * min(context, most)
    assert decode_attention_flops(model, [context]) == layers * (attended + scores)
    wide = config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]
    pairs = sum(min(seen, most) for seen in range(begin + 1, context + 1))
    scored = sum(range(begin + 1, context + 1))
    assert prefill_attention_flops(model, begin, chunk) == layers * (2 * heads * wide * pairs + 2 * index * scored)
    assert active_weights(model).parameters <= total_weights(model).parameters
