"""Stored bits of every quantisation method, and which modules it reaches."""
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvsim.models.model_costs import bits_per_weight, total_weights, weight_bytes
from pkvsim.models.presets import CATALOGUE, get_model
from pkvsim.models.quantization import fp8, grouped_int, mxfp, name_matcher, nvfp4

INPUTS = Path(__file__).parent / "inputs"
MATRICES = 32 * (4096 * 2 * (4096 + 1024) + 3 * 4096 * 14336)  # of Llama-3.1-8B's layers
REST = 8_030_261_248 - MATRICES


def llama(folder, quantization, beside=None, preset="llama-3.1-8b"):
    data = json.loads((CATALOGUE / f"{preset}.json").read_text())["config"]
    data.pop("quantization_config", None)
    folder.joinpath("config.json").write_text(json.dumps({**data, "quantization_config": quantization}))
    if beside is not None:
        folder.joinpath("hf_quant_config.json").write_text(json.dumps(beside))
    return get_model(folder)


def compressed(weights, **changes):
    group = {"weights": weights, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"], **changes}


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}, 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 32}, 4 + 20 / 32),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 4.5),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
            4 + 8 / 64 + 32 / 64 / 256,
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}, 4.5),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),  # the LM head stays by ModelOpt's default
        ({"quant_algo": "FP8", "producer": {"name": "modelopt"}, "ignore": ["lm_head"]}, 8),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 64}, 4 + 16 / 64),
        (compressed({"num_bits": 8, "type": "float", "strategy": "channel"}), 8),
        (compressed({"num_bits": 8, "type": "float", "strategy": "tensor"}), 8),
        (compressed({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}), 8),
        (compressed({"num_bits": 8, "type": "int", "strategy": "channel"}), 8),
        (compressed({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}), 4 + 16 / 128),
        (
            compressed({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}),
            4 + 20 / 32,
        ),
        (compressed({"num_bits": 4, "type": "float", "group_size": 16}), 4.5),
        (compressed({"num_bits": 4, "type": "float", "group_size": 32, "scale_dtype": "torch.uint8"}), 4.25),
    ],
)
def test_methods(tmp_path, quantization, bits):
    """Layer matrices narrow, embedding and LM head not; scales of single rows and columns within 0.2 %."""
    model = llama(tmp_path, quantization)
    assert total_weights(model).parameters == 8_030_261_248
    assert weight_bytes(model) == pytest.approx(MATRICES * bits / 8 + 2 * REST, rel=2e-3)
    assert bits_per_weight(model)["lm_head"] == 16


def test_modelopt_checkpoint():
    """Its quantisation stands in hf_quant_config.json alone: 72.7 GB, not 141."""
    model = get_model(INPUTS / "modelopt_llama70b-fp8")
    matrices = 80 * (8192 * 2 * (8192 + 1024) + 3 * 8192 * 28672)
    assert weight_bytes(model) == pytest.approx(matrices + 2 * (70_553_706_496 - matrices), rel=1e-6)
    assert weight_bytes(model) == pytest.approx(72.7e9, rel=1e-3)
    assert (model.quantization, model.kv_cache_type) == ("modelopt fp8", "fp8")
    assert not model.notes


def test_hf_quant_config_beside_a_named_file(tmp_path):
    """X_config.json goes with X_hf_quant_config.json; exclusions as NVIDIA's checkpoints list them."""
    data = json.loads((CATALOGUE / "qwen3-30b-a3b.json").read_text())["config"]
    (tmp_path / "nvidia--Qwen3-30B-A3B-NVFP4_config.json").write_text(json.dumps(data))
    excluded = ["lm_head", *(f"model.layers.{at}.{name}" for at in range(48) for name in ("mlp.gate", "self_attn*"))]
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8", "exclude_modules": excluded}
    without = get_model(tmp_path / "nvidia--Qwen3-30B-A3B-NVFP4_config.json")
    assert any("the name says NVFP4" in note for note in without.notes)
    beside = tmp_path / "nvidia--Qwen3-30B-A3B-NVFP4_hf_quant_config.json"
    beside.write_text(json.dumps({"quantization": quantization}))
    model = get_model(tmp_path / "nvidia--Qwen3-30B-A3B-NVFP4_config.json")
    found = bits_per_weight(model)
    assert (found["experts"], found["attention"], found["lm_head"]) == (4.5, 16, 16)
    assert not model.notes


def test_config_wins_over_the_file_beside(tmp_path):
    model = llama(tmp_path, {"quant_method": "fp8"}, {"quantization": {"quant_algo": "NVFP4"}})
    assert model.quantization == "fp8"


def test_targets_by_name(tmp_path):
    """Groups of layers with types of their own; what no group names stays in 16 bits."""
    groups = {
        "a": {"weights": {"num_bits": 8, "type": "float"}, "targets": ["re:.*self_attn.*"]},
        "b": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["re:.*mlp.(up|gate)_proj"]},
    }
    found = bits_per_weight(llama(tmp_path, {"quant_method": "compressed-tensors", "config_groups": groups}))
    assert (found["attention"], found["lm_head"]) == (8, 16)
    assert found["mlp"] == pytest.approx((2 * 4.5 + 16) / 3, rel=1e-9)


def test_lm_head_where_it_is_quantised(tmp_path):
    scheme = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
    assert bits_per_weight(llama(tmp_path, compressed(scheme, ignore=[])))["lm_head"] == 4 + 16 / 128
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "lm_head": True}
    assert bits_per_weight(llama(tmp_path, gptq))["lm_head"] == pytest.approx(4.16, abs=0.01)


def test_routers_stay_wide(tmp_path):
    """Routers are parameters, not linear layers: DeepSeek's FP8 checkpoints do not list them and keep them in BF16."""
    model = llama(tmp_path, {"quant_method": "fp8", "weight_block_size": [128, 128]}, preset="qwen3-30b-a3b")
    layer = model.layers[0]
    assert layer.norms_and_router.bytes == 2 * layer.norms_and_router.parameters
    assert layer.expert.bytes == pytest.approx(layer.expert.parameters, rel=1e-3)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "aqlm"}, "expected quant_method to be one of fp8, compressed-tensors, .* got 'aqlm'"),
        ({}, "expected quant_method to be one of .* got None"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "expected weight_block_size to be two whole numbers"),
        ({"quant_method": "awq", "bits": "4"}, "expected bits to be a whole number >= 1, got '4'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}, "expected all layers alike"),
        ({"quant_method": "bitsandbytes"}, "expected load_in_4bit or load_in_8bit to be true"),
        ({"quant_method": "compressed-tensors"}, "expected config_groups"),
        ({"quant_method": "modelopt", "quant_algo": "FP6"}, "expected a known quant_algo, got 'FP6'"),
        (
            {"quant_method": "modelopt", "quantized_layers": {"model.layers.0.mlp": {"quant_algo": "X"}}},
            "expected a known quant_algo, got 'X'",
        ),
        ({"quant_method": "fp8", "modules_to_not_convert": [3]}, "expected modules_to_not_convert to be a list"),
    ],
)
def test_refusals(tmp_path, quantization, message):
    with pytest.raises(ValueError, match=f"config.json: field quantization_config: {message}"):
        llama(tmp_path, quantization)


def test_bad_file_beside(tmp_path):
    data = json.loads((CATALOGUE / "llama-3.1-8b.json").read_text())["config"]
    tmp_path.joinpath("config.json").write_text(json.dumps(data))
    tmp_path.joinpath("hf_quant_config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: hf_quant_config.json: expected an object with quantization"):
        get_model(tmp_path)


PARTS = ["model", "layers", "0", "1", "10", "self_attn", "mlp", "gate", "gate_proj"]
NAMES = st.lists(st.sampled_from(PARTS), min_size=1)


@given(NAMES, NAMES)
def test_plain_names_match_whole_components(name, pattern):
    """Equal, or a run of the name's components: "gate" is not "gate_proj", layer 1 is not layer 10."""
    runs = {tuple(name[a:b]) for a in range(len(name)) for b in range(a + 1, len(name) + 1)}
    assert name_matcher([".".join(pattern)])(".".join(name)) == (tuple(pattern) in runs)


def test_patterns():
    assert name_matcher(["model.layers.1*"])("model.layers.1.mlp")
    assert name_matcher(["re:.*self_attn.*"])("a.self_attn.q")
    assert name_matcher(["model.layers.*.self_attn"])("model.layers.7.self_attn.q_proj")
    assert not name_matcher(["mtp.*"])("model.layers.0.mtp")
    assert not name_matcher([])("x")


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_stored_bytes_grow_with_bits(rows, columns):
    kinds = [mxfp(4), nvfp4(), grouped_int(4, 32, zero_points=True), fp8(), fp8((128, 128)), mxfp(8)]
    sizes = [kind.matrix_bytes(rows, columns) for kind in kinds]
    assert sizes == sorted(sizes)
    assert rows * columns / 2 < sizes[0] and sizes[-1] < 2 * rows * columns
