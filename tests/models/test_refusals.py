"""What a config that is not understood says: one line that names the file and the field."""
import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim.models.hugging_face import model_from_config
from pkvsim.models.model_costs import total_weights
from pkvsim.models.presets import CATALOGUE, get_model

CONFIGS = Path(__file__).parent / "configs"


def config(name="llama-3.1-8b", **changes):
    """A preset's or a reference config with other values; "absent" takes a field out."""
    preset = CATALOGUE / f"{name}.json"
    data = json.loads((preset if preset.exists() else CONFIGS / f"{name}.json").read_text())
    data = copy.deepcopy(data.get("config", data))
    part = data.get("text_config", data)
    for key, value in changes.items():
        part[key] = value
        if value == "absent":
            del part[key]
    return data


HQQ, ONE_LAYER = {"quant_method": "hqq"}, {"full_attn_layers": [1], "kda_layers": []}
DEEPSEEK, V4, KIMI = "deepseek-ai--DeepSeek-V3", "deepseek-ai--DeepSeek-V4-Flash", "moonshotai--Kimi-K3"
NEMOTRON, QWEN35, LLAMA4 = (
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "Qwen--Qwen3.5-27B",
    "meta-llama--Llama-4-Maverick-17B-128E-Instruct",
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (config(architectures=["BertModel"]), "field architectures: expected one of the .* got .'BertModel'"),
        (config(architectures="absent"), "field architectures: expected one of"),
        (config(hidden_size="absent"), "field hidden_size: missing"),
        (config(hidden_size="4096"), "field hidden_size: expected a whole number >= 1, got '4096'"),
        (config(hidden_size=True), "field hidden_size: expected a whole number"),
        (config(num_hidden_layers=0), "field num_hidden_layers: expected a whole number >= 1, got 0"),
        (config(num_key_value_heads=5), "field num_key_value_heads: expected a divisor of 32 query heads, got 5"),
        (config(hidden_size=4100), "field head_dim: missing, and hidden_size 4100"),
        (config(kv_lora_rank=512), "field kv_lora_rank: unknown for LlamaForCausalLM"),
        (config(sliding_window=4096), "field sliding_window: unknown for LlamaForCausalLM"),
        (config(qkv_bias=True), "field qkv_bias: unknown for LlamaForCausalLM"),
        (config(torch_dtype="int3"), "field torch_dtype: expected one of bfloat16, .* got 'int3'"),
        (config(tie_word_embeddings=1), "field tie_word_embeddings: expected true or false, got 1"),
        (config(quantization_config=HQQ), "field quantization_config: expected quant_method .*'hqq'"),
        (config(quantization_config="fp8"), "field quantization_config: expected an object, got str"),
        (config("gpt-oss-20b", layer_types=["full_attention"]), "field layer_types: expected 24 of"),
        (config("gpt-oss-20b", layer_types=["no"] * 24), "field layer_types: expected 24 of"),
        (config("gpt-oss-20b", sliding_window="absent"), "field sliding_window: missing"),
        (config("gpt-oss-20b", num_experts_per_tok=33), "field num_experts_per_tok: expected at most the 32 experts"),
        (config("qwen3-30b-a3b", mlp_only_layers=["0"]), "field mlp_only_layers: expected a list of layers"),
        (config(DEEPSEEK, kv_lora_rank="absent"), "field kv_lora_rank: missing"),
        (config(DEEPSEEK, n_routed_experts="absent"), "field n_routed_experts: missing"),
        (config("zai-org--GLM-5.2", indexer_types=["full"]), "field indexer_types: expected 78 of full or shared"),
        (config(V4, compress_ratios=[4]), "field compress_ratios: expected at least 43 whole numbers"),
        (config(V4, expert_dtype="fp2"), "field expert_dtype: expected fp4 or fp8, got 'fp2'"),
        (config(V4, num_key_value_heads=2), "field num_key_value_heads: expected 1"),
        (config(NEMOTRON, hybrid_override_pattern="MEX"), "field hybrid_override_pattern: expected letters of M"),
        (config(NEMOTRON, num_hidden_layers=51), "field num_hidden_layers: expected 52, one for each block, got 51"),
        (config(QWEN35, mamba_ssm_dtype="int8"), "text_config: field mamba_ssm_dtype: expected one of float32"),
        (config(QWEN35, some_new_thing=3), "text_config: field some_new_thing: unknown for Qwen3_5"),
        (config(LLAMA4, no_rope_layers=[1]), "text_config: field no_rope_layers: expected 48 of 0 or 1"),
        (config(KIMI, linear_attn_config=ONE_LAYER), "full_attn_layers: expected with"),
        (config(KIMI, num_nextn_predict_layers=1), "field num_nextn_predict_layers: expected 0"),
        (config("google--gemma-4-26B-A4B", num_kv_shared_layers=4), "field num_kv_shared_layers: unknown"),
        ([1], "expected an object of a Hugging Face config, got list"),
        (
            {"architectures": ["KimiK25ForConditionalGeneration"], "text_config": {"architectures": ["X"]}},
            "text_config: field architectures: expected one that is read",
        ),
        (
            {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": []}},
            "text_config: field architectures: expected one that is read, got None",
        ),
        (
            {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"architectures": [{}]}},
            "text_config: field architectures: expected one that is read",
        ),
    ],
)
def test_bad_configs(tmp_path, data, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"config.json: .*{message}") as caught:
        get_model(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_config_of_a_windows_editor_and_one_that_may_not_be_looked_at(tmp_path, monkeypatch):
    """A byte order mark is no part of the text; a name that no file can have, or a locked folder, is a bad name."""
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(config()).encode())
    assert get_model(path).num_layers == 32
    with pytest.raises(ValueError, match="model: expected one of .* or a Hugging Face config.json"):
        get_model("a" * 5000)
    with pytest.raises(ValueError, match="cannot read a model: File name too long"):
        get_model(f"{'a' * 5000}/config.json")


def test_grouped_shape_of_models_that_have_none():
    """Prices of one grouped-query shape are refused where layers differ, by what the layers are."""
    model = get_model(CONFIGS / f"{DEEPSEEK}.json")
    with pytest.raises(ValueError, match=r"model: .*V3: expected layers of grouped-query .* got latent 128/1 x 576"):
        model.shape(16)
    for name in (QWEN35, "google--gemma-4-26B-A4B", LLAMA4, "nvidia--MiniMax-M3-NVFP4"):
        with pytest.raises(ValueError, match="expected layers of grouped-query attention of one shape"):
            _ = get_model(CONFIGS / f"{name}.json").num_q_heads


VALUES = (None, "x", -1, 0, [], {}, True, 1.5, [None], [[]], {"a": 1}, 10**30)
FUZZED = (DEEPSEEK, V4, KIMI, NEMOTRON, QWEN35, LLAMA4, "nvidia--MiniMax-M3-NVFP4", "nvidia--GLM-5.1-NVFP4",
          "moonshotai--Kimi-K2.5", "google--gemma-4-26B-A4B", "openai--gpt-oss-20b")  # fmt: skip


def places(part, path=()):
    """Where a config has values, objects inside included."""
    for key, value in part.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


@given(st.sampled_from(FUZZED).map(config), st.data())
@settings(max_examples=60, deadline=None)
def test_any_value_anywhere_reads_or_is_refused_in_one_line(data, draws):
    *path, last = draws.draw(st.sampled_from(list(places(data))))
    part = data
    for key in path:
        part = part[key]
    part[last] = draws.draw(st.sampled_from(VALUES))
    try:
        model = model_from_config(data, name="m", source="s", where="config.json")
    except ValueError as error:
        assert str(error).startswith("config.json") and "\n" not in str(error)
    else:
        assert total_weights(model).bytes > 0
