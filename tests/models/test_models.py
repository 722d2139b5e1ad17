"""Models: published parameter counts from configs alone, sharding, experts, and what a bad config says."""
import copy
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvsim.models.model_costs import decode_attention_flops, decode_read_bytes, prefill_attention_flops
from pkvsim.models.model_spec import with_kv_heads
from pkvsim.models.presets import (
    CATALOGUE,
    active_weights,
    catalogue,
    decode_weight_bytes,
    experts_touched,
    flops_per_token,
    get_model,
    kv_bytes_per_token,
    total_weights,
    weight_bytes,
)
from pkvsim.models.weight_bits import with_weight_bits

# Parameters as the safetensors of each model's Hugging Face page count them.
PARAMETERS = {
    "gpt-oss-20b": 20_914_757_184,
    "llama-3.1-70b-tp4": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-30b-a3b": 30_532_122_624,
}
MODELS = st.sampled_from(sorted(PARAMETERS))
preset = cache(get_model)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    assert total_weights(get_model(name, tensor_parallel=1)).parameters == PARAMETERS[name]


def test_active_parameters():
    """GPT-OSS counts 3.6 B without its embedding (arXiv 2508.10925), Qwen3 3.3 B with it (arXiv 2505.09388)."""
    assert active_weights(get_model("gpt-oss-20b")).parameters == pytest.approx(3.61e9, rel=2e-3)
    qwen = get_model("qwen3-30b-a3b")
    assert active_weights(qwen).parameters + qwen.embedding.parameters == pytest.approx(3.35e9, rel=2e-3)


def test_gpt_oss_takes_what_its_checkpoint_takes():
    """Its three safetensors files hold 4.79 + 4.80 + 4.17 GB."""
    assert weight_bytes(get_model("gpt-oss-20b")) == pytest.approx(13.76e9, rel=1e-3)


def test_presets_are_the_catalogue():
    assert set(catalogue()) == set(PARAMETERS)
    for path in CATALOGUE.glob("*.json"):
        assert json.loads(path.read_text())["source"].startswith("https://huggingface.co/")


def test_kv_bytes():
    assert kv_bytes_per_token(get_model("llama-3.1-8b")) == 32 * 2 * 8 * 128 * 2
    assert kv_bytes_per_token(get_model("gpt-oss-20b")) == 24 * 2 * 8 * 64 * 2
    shared = get_model("llama-3.1-70b-tp4")
    assert (shared.num_q_heads, shared.num_kv_heads, shared.tensor_parallel) == (16, 2, 4)
    assert kv_bytes_per_token(shared) == 80 * 2 * 2 * 128 * 2
    assert get_model("llama-3.1-8b").shape(16).group_size == 4


def test_sliding_layers():
    model = get_model("gpt-oss-20b")
    assert (model.sliding_window, model.num_sliding_layers, model.num_full_layers) == (128, 12, 12)
    assert get_model("qwen2.5-7b").num_sliding_layers == 0


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("parallel", [2, 4])
def test_shares_of_the_weights_add_up(name, parallel):
    whole, share = get_model(name, tensor_parallel=1), get_model(name, tensor_parallel=parallel)
    each = sum(layer.norms_and_router.bytes for layer in whole.layers) + whole.final_norm.bytes
    replicated = each * (parallel - 1)
    assert weight_bytes(share) * parallel == pytest.approx(weight_bytes(whole) + replicated, rel=1e-6)
    assert share.num_kv_heads * parallel == whole.num_kv_heads
    assert kv_bytes_per_token(share) * parallel == kv_bytes_per_token(whole)


@given(MODELS, st.integers(1, 4096))
def test_decode_bytes_lie_between_one_token_and_everything(name, batch):
    model = preset(name)
    rows = model.embedding.bytes / model.vocab_size
    read, more = decode_weight_bytes(model, np.array([batch, batch + 1]))
    assert decode_weight_bytes(model, 1) <= read < more
    unread = 0 if model.tied_embeddings else model.embedding.bytes  # a tied one is the output matrix too
    assert read - batch * rows <= weight_bytes(model) - unread + 1
    assert read == decode_weight_bytes(model, batch)


@given(st.sampled_from(["gpt-oss-20b", "qwen3-30b-a3b"]), st.integers(1, 200))
def test_experts_touched(name, batch):
    model = preset(name)
    touched = experts_touched(model, batch)
    most = min(model.num_experts, batch * model.experts_per_token)
    assert model.experts_per_token * (1 - 1e-6) <= touched <= most * (1 + 1e-6)
    assert experts_touched(model, 1) == pytest.approx(model.experts_per_token)
    assert experts_touched(preset("llama-3.1-8b"), batch) == 1


def test_experts_touched_is_the_mean_of_even_routing():
    model, rng = preset("gpt-oss-20b"), np.random.default_rng(1)
    draws = [len({e for _ in range(6) for e in rng.choice(32, 4, replace=False)}) for _ in range(4000)]
    assert experts_touched(model, 6) == pytest.approx(np.mean(draws), rel=0.01)


def test_flops_are_twice_the_active_matrices():
    model = get_model("llama-3.1-8b")
    norms = 4096 * (2 * 32 + 1)
    assert flops_per_token(model) == 2 * (active_weights(model).parameters - norms)
    assert flops_per_token(model) - flops_per_token(model, lm_head=False) == 2 * 128256 * 4096


def config(preset="llama-3.1-8b", **changes):
    data = copy.deepcopy(json.loads((CATALOGUE / f"{preset}.json").read_text())["config"])
    data.update(changes)
    return {key: value for key, value in data.items() if value != "absent"}


def test_config_files(tmp_path):
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(config(rope_theta=5e5, transformers_version="4.43", _name_or_path="x", head_dim=None)))
    for given_path in (path, path.parent, str(path)):
        model = get_model(given_path)
        assert model.name == "tiny" and total_weights(model).parameters == PARAMETERS["llama-3.1-8b"]
    mistral = config(tie_word_embeddings=True, architectures=["MistralForCausalLM"], sliding_window=4096)
    path.write_text(json.dumps(mistral))
    model = get_model(path)
    assert total_weights(model).parameters == PARAMETERS["llama-3.1-8b"] - 128256 * 4096
    assert (model.sliding_window, model.num_sliding_layers) == (4096, 32)
    assert decode_weight_bytes(model, 1) > decode_weight_bytes(get_model("llama-3.1-8b"), 1) - 1e5


def test_qwen3_dense(tmp_path):
    """Qwen3-8B: 8,190,735,360 parameters (https://huggingface.co/Qwen/Qwen3-8B)."""
    path = tmp_path / "config.json"
    sizes = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, vocab_size=151936, head_dim=128)
    path.write_text(json.dumps(config(architectures=["Qwen3ForCausalLM"], max_position_embeddings=40960, **sizes)))
    assert total_weights(get_model(path)).parameters == 8_190_735_360


INPUTS = Path(__file__).parent / "inputs"


def test_fields_of_no_effect_are_ignored_with_a_reason():
    """Qwen3-Coder: 480,154,875,392 parameters; SmolLM2-135M: 134,515,008; Llama-3.2-1B: 1,235,814,400 (their pages)."""
    coder, smol, unsloth = (get_model(INPUTS / name) for name in ("qwen3-coder", "smollm2", "unsloth"))
    assert total_weights(coder).parameters == 480_154_875_392
    assert dict(coder.ignored)["qkv_bias"] == "false: no biases"
    assert dict(coder.ignored)["sliding_window"] == "no layer slides"
    assert total_weights(smol).parameters == 134_515_008
    assert {"is_llama_config", "rope_interleaved"} <= set(dict(smol.ignored))
    assert total_weights(unsloth).parameters == 1_235_814_400
    assert "unsloth_fixed" in dict(unsloth.ignored)
    assert all(why for _, why in coder.ignored + smol.ignored + unsloth.ignored)


def test_missing_kv_heads_are_as_many_as_query_heads(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config(num_key_value_heads="absent")))
    assert get_model(path).num_kv_heads == 32


def test_tensor_parallel_beyond_the_kv_heads():
    """vLLM keeps a copy of each KV head on several GPUs."""
    whole, share = get_model("llama-3.1-8b"), get_model("llama-3.1-8b", tensor_parallel=16)
    assert (share.num_q_heads, share.num_kv_heads, share.shape(16).group_size) == (2, 1, 2)
    assert kv_bytes_per_token(share) * 8 == kv_bytes_per_token(whole)
    copied = 32 * 2 * 128 * 8 * 4096 * 2  # a second copy of the key and value projections
    norms = (32 * 2 + 1) * 4096 * 2
    assert weight_bytes(share) * 16 == pytest.approx(weight_bytes(whole) + copied + 15 * norms, rel=1e-6)


def test_attention_counts_by_hand():
    """Of one decode step: Llama's rows read all keys and values; half of GPT-OSS's layers read 128 tokens."""
    llama, rows = get_model("llama-3.1-8b"), [100, 5000]
    assert decode_read_bytes(llama, rows) == 5100 * kv_bytes_per_token(llama)
    assert decode_attention_flops(llama, rows) == 32 * 4 * 32 * 128 * 5100
    oss = get_model("gpt-oss-20b")
    assert decode_attention_flops(oss, rows) == 4 * 64 * 64 * 12 * (5100 + 100 + 128)
    assert prefill_attention_flops(llama, 0, 1000) == 32 * 4 * 32 * 128 * 1000 * 1001 / 2
    assert prefill_attention_flops(oss, 0, 1000) == 4 * 64 * 64 * 12 * (1000 * 1001 / 2 + 128 * 129 / 2 + 872 * 128)


def test_narrow_weights():
    """4 bits: every layer matrix at 4 + 20/128 bits, embedding and LM head at 16."""
    model = get_model("qwen3-30b-a3b")
    narrow = with_weight_bits(model, 4)
    matrices = 48 * (2048 * 2 * (4096 + 512) + 128 * 3 * 2048 * 768)
    assert weight_bytes(model) - weight_bytes(narrow) == pytest.approx(matrices * (16 - 4 - 20 / 128) / 8, rel=1e-3)
    assert flops_per_token(narrow) == flops_per_token(model)
    oss = get_model("gpt-oss-20b")
    assert weight_bytes(with_weight_bits(oss, 8)) < weight_bytes(oss)
    assert with_weight_bits(oss, 8).layers[0].expert == oss.layers[0].expert


def test_other_kv_heads():
    model = with_kv_heads(get_model("gpt-oss-20b"), 16)
    assert (model.num_kv_heads, kv_bytes_per_token(model)) == (16, 24 * 2 * 16 * 64 * 2)


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match="model: expected one of gpt-oss-20b, .* got 'llama-9'"):
        get_model("llama-9")
    with pytest.raises(ValueError, match="none.json: cannot read a model: No such file"):
        get_model(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json: cannot read a model: Expecting"):
        get_model(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="tensor_parallel: expected a divisor of qwen2.5-7b's 28 query heads, got 3"):
        get_model("qwen2.5-7b", tensor_parallel=3)
    with pytest.raises(ValueError, match="tensor_parallel: expected a divisor or a multiple of .* 4 KV heads, got 14"):
        get_model("qwen2.5-7b", tensor_parallel=14)
