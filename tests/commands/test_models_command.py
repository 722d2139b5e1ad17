"""pkvsim models: presets and configs in figures, for people and for programs."""
import json

from command import pkvsim
from paths import ROOT

CONFIGS = ROOT / "tests" / "models" / "configs"


def test_catalogue(capsys, monkeypatch):
    code, out, _ = pkvsim(capsys, monkeypatch, "models")
    assert code == 0 and "llama-3.1-8b" in out and "128.0" in out and "DeepseekV3ForCausalLM" in out


def test_one_model(capsys, monkeypatch):
    code, out, _ = pkvsim(capsys, monkeypatch, "models", str(CONFIGS / "nvidia--Qwen3.5-397B-A17B-NVFP4.json"))
    assert code == 0
    for shown in (
        "396,346,350,336", "237.03 GB", "30,720 B", "192,", "full 32/2 x 256", "10 of 512 experts of 1024",
        "note: the text part alone", "vision_config", "fp8",
    ):  # fmt: skip
        assert shown in out


def test_json(capsys, monkeypatch):
    names = ("gpt-oss-20b", str(CONFIGS / "deepseek-ai--DeepSeek-V3.json"))
    code, out, _ = pkvsim(capsys, monkeypatch, "models", *names, "--json")
    oss, deepseek = json.loads(out)
    assert code == 0
    assert [run["attention"]["kind"] for run in oss["layers"][:3]] == ["sliding", "full", "sliding"]
    assert (oss["layers"][0]["attention"]["window"], oss["layers"][0]["attention"]["sinks"]) == (128, True)
    assert oss["kv_bytes_per_token_beyond_windows"] * 2 == oss["kv_bytes_per_token"]
    assert [run["count"] for run in deepseek["layers"]] == [3, 58]
    assert deepseek["layers"][1]["feed_forward"]["num_experts"] == 256
    assert sum(run["count"] * run["weights"]["parameters"] for run in deepseek["layers"]) < deepseek["parameters"]
    assert deepseek["prediction_heads"]["layers"] == 1 and deepseek["ignored"]["rope_theta"]


def test_shares_and_errors(capsys, monkeypatch):
    code, out, _ = pkvsim(capsys, monkeypatch, "models", "llama-3.1-8b", "--tensor-parallel", "16", "--json")
    assert code == 0 and json.loads(out)[0]["layers"][0]["attention"]["num_kv_heads"] == 1
    code, _, err = pkvsim(capsys, monkeypatch, "models", "nothing")
    assert code == 2 and err.startswith("pkvsim: error: model: expected one of") and err.count("\n") == 1
