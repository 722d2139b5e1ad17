"""python -m gpu.serve: what it prints and writes, and one line for what it refuses."""
from __future__ import annotations

import csv
import importlib.util
import json

import pytest

torch = pytest.importorskip("torch")
import typer  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import gpu.serve.__main__ as serve_command  # noqa: E402
from gpu.serve.__main__ import serve  # noqa: E402
from gpu.serve.attention import check_kernels  # noqa: E402
from gpu.serve.llm import LLM, ServeOptions  # noqa: E402
from gpu.serve.model.config import find_config, known_to_pkvsim, read_config  # noqa: E402
from gpu.serve.model.weights import weights_bytes  # noqa: E402
from pkvsim.models.presets import get_model, weight_bytes  # noqa: E402

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
          "num_attention_heads": 4, "head_dim": 64, "num_key_value_heads": 2, "vocab_size": 199,
          "max_position_embeddings": 512, "torch_dtype": "bfloat16"}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}
LOAD = ("--cpu", "--dummy-weights", "--max-batch", "8", "--step-tokens", "64", "--input-tokens", "20-90", "--output-tokens",
        "2-9", "--requests", "12", "--concurrency", "5", "--shared-prefix", "40", "--prefix-cache", "lru")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def run(*arguments: str):
    app = typer.Typer()
    app.command()(serve)
    return CliRunner().invoke(app, arguments)


def test_prompts_are_kept_on_tiers(model, tmp_path):
    tiers = "--tier", "host:1MiB:50", "--tier", f"disk0:8MiB:5={tmp_path}"
    done = run("--model", model, *LOAD, *tiers, "--predict", "--device", "h200", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ended"] == {"served": 12} and found["tiers"]["blocks"] > 0 and found["tiers"]["disk0"]["faults"] == 0
    done = run("--model", model, *LOAD, *tiers)
    assert done.exit_code == 0 and "blocks are kept" in done.output and "brought" in done.output
    again = [*LOAD, "--tier", "host:1MiB:50", "--tier", f"disk0:8MiB:5={tmp_path / 'b'}"]
    done = run("--model", model, *again, "--tier-flush", "20")
    assert done.exit_code == 0 and "blocks of host memory were written to disks" in done.output
    loaded = []
    for place in (tmp_path, tmp_path / "b"):  # without a flush and with one
        done = run("--model", model, *LOAD, "--tier", f"disk0:8MiB:5={place}", "--json")
        loaded.append(json.loads(done.stdout)["tiers"]["loaded_tokens"])
    assert loaded[1] > 2 * loaded[0]
    for tier in ([], ["--tier", "host:1MiB:50"]):
        done = run("--model", model, *LOAD, *tier, "--tier-flush", "20")
        assert done.exit_code == 2 and "tier_flush: expected host memory and a disk" in done.output
    done = run("--model", model, *again, "--tier-flush", "-1")
    assert done.exit_code == 2 and "flush_s: expected seconds >= 0" in done.output
    done = run("--model", model, *LOAD, "--tier", "host")
    assert done.exit_code == 2 and "tier" in done.output and "Traceback" not in done.output


def test_json_and_files_of_both_runs(model, tmp_path):
    files = [tmp_path / name for name in ("steps.csv", "requests.csv", "run.json")]
    done = run("--model", model, *LOAD, "--predict", "--device", "h200", "--json", "--steps-csv", str(files[0]),
               "--requests-csv", str(files[1]), "--timeline", str(files[2]))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ended"] == {"served": 12} and found["free_pages"] == found["kv_pages"]
    assert set(found["results"]) == set(found["steps"]) == {"measured", "predicted"}
    measured = found["results"]["measured"]
    assert measured["output_tokens"] == found["results"]["predicted"]["output_tokens"]
    assert set(measured) == set(found["results"]["predicted"])
    assert measured["kv_pages"] == found["results"]["predicted"]["kv_pages"] == found["kv_pages"]
    assert measured["prefix_hit_tokens"] > 0 and measured["ttft_s"]["p50"] > 0
    assert {kind["kind"] for kind in found["steps"]["measured"]} <= {"decode", "mixed", "prefill"}
    errors = {error["kind"]: error for error in found["step_errors"]}
    assert errors["all"]["steps"] == sum(kind["steps"] for kind in found["steps"]["measured"])
    assert all(error["p90"] >= 0 and abs(error["bias"]) <= error["mean"] + 1e-12 for error in errors.values())
    steps = list(csv.DictReader(files[0].open()))
    assert "decode_lens" not in steps[0]
    assert sum(int(step["prefill_tokens"]) for step in steps) == sum(
        int(row["prompt_tokens"]) - int(row["hit_tokens"])
        for row in csv.DictReader(files[1].open()) if row["policy"] == "measured")
    names = {event["args"]["name"] for event in json.loads(files[2].read_text())["traceEvents"]
             if event["name"] == "process_name"}
    assert names == {"policy measured", "policy predicted"}


def test_tables(model):
    done = run("--model", model, *LOAD, "--predict", "--device", "h200")
    assert done.exit_code == 0, done.output
    assert "steps against their prices, mean error (bias): all " in done.stdout
    done = run("--model", model, *LOAD)
    assert done.exit_code == 0, done.output
    for words in ("12 of 12 requests served", "TTFT p50", "between tokens p99", "measured, mixed"):
        assert words in done.stdout


@pytest.mark.parametrize(("arguments", "words"), [
    (("--model", "nowhere"), "model: expected one of"),
    (("--timeline", "run.json"), "timeline: expected only with --predict"),
    (("--max-batch", "0"), "max_batch: expected"),
    (("--prefix-cache", "belady"), "prefix_cache: expected none or lru"),
    (("--order", "batchllm"), "order: expected one of fcfs, shortest, kvshare"),
    (("--kv-dtype", "int4"), "kv_dtype: expected"),
    (("--order", "kvshare", "--prefix-cache", "none"), "order: kvshare orders by what a prefix cache holds"),
    (("--device", "nothing", "--predict"), "device: expected one of"),
    (("--device", "h200"), "device: expected only with --predict"),
    (("--predict",), "as no CUDA device answers"),
    (("--steps-csv", "no folder/steps.csv"), "steps_csv: cannot write no folder/steps.csv: no folder"),
    (("--predict", "--device", "h200", "--max-context", "8"), "expected a request that fits"),
])
def test_refusals_are_one_line(model, arguments, words):
    done = run("--model", model, *LOAD, *arguments)
    assert done.exit_code == 2
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [
    ("--order", "batchllm"), ("--order", "kvshare", "--prefix-cache", "none"), ("--steps-csv", "no folder/steps.csv"),
])  # fmt: skip
def test_refusals_come_before_weights_are_read(model, monkeypatch, arguments):
    monkeypatch.setattr("gpu.serve.llm.load", lambda *_, **__: pytest.fail("weights are read"))
    assert run("--model", model, *LOAD, *arguments).exit_code == 2


@pytest.mark.parametrize("max_context", [1, 2, 9, 40])
def test_a_server_of_short_requests_alone_refuses_the_others(model, max_context):
    done = run("--model", model, *LOAD, "--json", "--max-context", str(max_context))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found["ended"]) == {"refused"} and found["free_pages"] == found["kv_pages"]


def test_the_prediction_refuses_what_the_server_refuses(model):
    done = run("--model", model, *LOAD, "--json", "--predict", "--device", "h200", "--max-context", "90")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert 0 < found["ended"]["refused"] < 12
    assert {run["finished"] for run in found["results"].values()} == {found["ended"]["served"]}


@pytest.mark.parametrize("option", ["--steps-csv", "--requests-csv", "--timeline"])
def test_what_was_measured_is_told_though_a_file_cannot_be_written(model, tmp_path, option):
    folder = tmp_path / ("run.json" if option == "--timeline" else "run.csv")
    folder.mkdir()
    done = run("--model", model, *LOAD, "--predict", "--device", "h200", option, str(folder))
    assert done.exit_code == 2 and "cannot write" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert "steps against their prices" in done.stdout


def test_a_model_larger_than_the_machine_is_refused_before_its_weights_are_made(model, monkeypatch):
    monkeypatch.setattr("gpu.serve.llm.free_host_bytes", lambda: 1000)
    done = run("--model", model, *LOAD)
    assert done.exit_code == 2 and "model: expected at most 0.00 GiB of weights" in done.stderr


@pytest.mark.parametrize(("head_dim", "page_size", "words"), [
    (80, 16, "model: expected one that our kernels decode, got tiny: head_dim 80 is not one of"),
    (64, 512, "got tiny: page size 512 is above 256"),
])  # fmt: skip
def test_what_no_kernel_decodes_is_refused_before_weights_are_made(tmp_path, monkeypatch, head_dim, page_size, words):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({**CONFIG, "head_dim": head_dim}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("gpu.serve.llm.weights_room", lambda options: None)
    monkeypatch.setattr("gpu.serve.model.weights._assemble", lambda *_: pytest.fail("weights are made"))
    with pytest.raises(ValueError, match=words):
        LLM(path, ServeOptions(device="cuda", dummy_weights=True, page_size=page_size))


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.2-1b", "qwen2.5-7b"])
def test_presets_are_decoded_by_our_kernels(name, kv_dtype):
    check_kernels(find_config(name), page_size=16, kv_dtype=kv_dtype)


def test_a_system_that_does_not_tell_of_its_memory_serves(model, monkeypatch):
    def unknown():
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr("gpu.serve.llm.free_host_bytes", unknown)
    assert run("--model", model, *LOAD, "--limit", "1").exit_code == 0


@pytest.mark.parametrize(("change", "words"), [
    ({"architectures": ["MixtralForCausalLM"]}, "architectures: expected one of"),
    ({"hidden_act": "gelu"}, "hidden_act: expected silu"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: expected none"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: expected one of"),
    ({"num_hidden_layers": None}, "num_hidden_layers: expected an integer"),
    ({"torch_dtype": "float64"}, "torch_dtype: expected one of"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: expected a number above 0"),
    ({"eos_token_id": "</s>"}, "eos_token_id: expected token ids"),
    ({"eos_token_id": True}, "eos_token_id: expected token ids"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architectures: expected one of"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}},
     "high_freq_factor: expected a number above low_freq_factor"),
    ({"rope_scaling": ["yarn"]}, "rope_scaling: expected one object"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_scaling: expected one object"),
    ({"rope_theta": -1.0}, "rope_theta: expected a number above"),
    ({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_theta: expected a number above 1"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps: expected a number above 0"),
    ({"head_dim": 5}, "head_dim: expected an even number"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1"),
    ({"architectures": ["MistralForCausalLM"], "sliding_window": "4096"}, "sliding_window: expected an integer"),
    (QWEN | {"max_window_layers": 1}, "max_window_layers: expected 0, or at least 2"),
    (QWEN | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: expected layers of one type"),
])
def test_configs_that_are_not_served(tmp_path, change, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, **change}))
    done = run("--model", str(path), *LOAD)
    assert done.exit_code == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(("change", "window"), [
    ({"max_window_layers": 0}, 8), ({"max_window_layers": 2}, None), ({"max_window_layers": None}, None), ({}, None),
    ({"layer_types": ["sliding_attention"] * 2, "max_window_layers": 1}, 8), ({"layer_types": ["full_attention"] * 2}, None),
])  # fmt: skip
def test_windows_of_qwen_are_those_of_its_layers(change, window):
    assert read_config({**CONFIG, **QWEN, **change}, name="qwen").window == window


def test_only_some_families_have_biases_of_the_output_projection():
    for family, expected in (("Llama", True), ("Qwen3", True), ("Qwen2", False), ("Mistral", False)):
        config = read_config({**CONFIG, "architectures": [f"{family}ForCausalLM"], "attention_bias": True}, name=family)
        assert config.output_bias == expected and config.qkv_bias == (family != "Mistral")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["[]", "null", "3", "{"])
def test_files_that_hold_no_object(tmp_path, name, text):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: cannot read a model"):
        find_config(tmp_path)


def test_tokens_that_end_a_turn_are_those_of_the_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": 2}))
    assert find_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert find_config(tmp_path).eos_token_ids == (2, 7)


def test_a_preset_of_several_gpus_is_predicted_whole_as_it_is_served():
    config = find_config("llama-3.1-70b-tp4")
    known = known_to_pkvsim(config)
    assert (known.num_q_heads, known.num_kv_heads, known.tensor_parallel) == (config.num_q_heads, config.num_kv_heads, 1)
    assert weight_bytes(known) == weights_bytes(config, torch.bfloat16)
    assert known_to_pkvsim(find_config("llama-3.1-8b")) == get_model("llama-3.1-8b")


def test_products_by_kernels_need_a_gpu(model):
    done = run("--model", model, *LOAD, "--streamed-products")
    assert done.exit_code == 2
    assert done.stderr == "pkvsim: error: streamed_products: expected only on a GPU, got device cpu\n"
    both = run("--model", model, *LOAD, "--limit", "1", "--torch-products")
    assert both.exit_code == 0, both.stderr


@pytest.mark.parametrize(("cpu", "installed", "said"), [
    (False, (), "error: torch is not installed: pip install"), (True, (), "error: torch is not installed: pip install"),
    (False, ("torch",), "no CUDA device answers: PyTorch serves on this CPU"), (True, ("torch",), ""),
])  # fmt: skip
def test_what_the_machine_lacks_is_said_in_a_line(model, monkeypatch, cpu, installed, said):
    own = importlib.util.find_spec
    for module in (importlib.util, serve_command):
        monkeypatch.setattr(module, "find_spec", lambda name, *more: (
            own(name, *more) if name in installed or name not in ("torch", "cupy") else None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("--model", model, *(LOAD if cpu else LOAD[1:]), "--limit", "1")
    assert done.exit_code == (0 if installed else 2), done.output
    lines = done.stderr.splitlines()
    assert said in (lines[0] if lines else "") and (installed or len(lines) == 1)
