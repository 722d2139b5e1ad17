"""The pkvsim command as a user runs it."""
import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

from pkvsim.devices.device import DEVICES

PAPER_RUN = (
    "replay --family bimodal --requests 24 --max-active 8 --steps 48 --seed 20260623 --device rtx3060 "
    "--split-splits 32 --workqueue-splits 20"
).split()
MOST_COMPILED = 2  # by the paper's replay, each a good part of a second on a first run
TRACE_KEYS = [
    "family", "seed", "requests", "max_active", "steps", "physical_pages", "mean_active", "distinct_lengths_mean",
    "decode_tokens",
]  # fmt: skip
ENGINE_KEYS = [
    "launches_per_step", "merge_launches_per_step", "cta_work_per_sm", "useful_kv_mib", "merge_mib",
    "nonempty_cta_fraction", "predicted_step_us",
]  # fmt: skip


def pkvsim(*args, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pkvsim", *args],
        cwd=cwd, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100", **environment},
    )  # fmt: skip


def test_json():
    done = pkvsim(*PAPER_RUN, "--policy", "paper", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert list(report) == ["trace", "device", "policy", "engines"]
    assert list(report["trace"]) == TRACE_KEYS
    assert report["trace"] == {
        "family": "bimodal", "seed": 20260623, "requests": 24, "max_active": 8, "steps": 48,
        "physical_pages": 24285, "mean_active": 8.0, "distinct_lengths_mean": 8.0, "decode_tokens": 384,
    }  # fmt: skip
    assert (report["device"], report["policy"]) == ("rtx3060", "paper")
    engines = report["engines"]
    assert list(engines) == ["flashinfer", "split", "workqueue", "adaptive"]
    for name, engine in engines.items():
        assert list(engine) == ENGINE_KEYS + (["routes"] if name == "adaptive" else [])
    assert engines["adaptive"]["routes"] == {"flashinfer": 0, "split": 0, "workqueue": 48}
    assert {k: v for k, v in engines["adaptive"].items() if k != "routes"} == engines["workqueue"]


def test_tables():
    done = pkvsim(*PAPER_RUN, "--policy", "paper")
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("bimodal", "24,285 physical pages", "550.5 MiB", "73.1", "4.06", "45.7", "2.54", "workqueue 48"):
        assert text in done.stdout


def test_devices():
    done = pkvsim("devices")
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("rtx3060", "h200", "302", f"{DEVICES['h200'].beta_gb_s:,.0f}", "b200", "~7,580", "datasheet only"):
        assert text in done.stdout
    done = pkvsim("devices", "rtx3060", "h200")
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("rtx3060", "h200", "302", f"{DEVICES['h200'].beta_gb_s:g}", "calibrated", "datasheet", "2606.26666"):
        assert text in done.stdout
    done = pkvsim("devices", "l4", "--json")
    assert [device["name"] for device in json.loads(done.stdout)] == ["l4"]
    assert pkvsim("devices", "b999").returncode == 2


def test_options_reach_the_replay(tmp_path):
    path = tmp_path / "requests.csv"
    path.write_text("prompt,decode\n20000,3\n30000,2\n")
    done = pkvsim(
        *"replay --max-active 1 --num-q-heads 16 --num-kv-heads 4 --head-dim 64 --page-size 32 --json".split(),
        *("--hole-fraction", "0.5", "--device", "h200", "--trace-file", str(path)),
    )
    report = json.loads(done.stdout)
    pages = -(-(20000 + 3) // 32) + -(-(30016 + 2) // 32)
    assert report["trace"]["physical_pages"] == 2 * pages and report["trace"]["steps"] == 3
    assert report["trace"]["family"] == "file" and report["device"] == "h200"
    assert report["engines"]["flashinfer"]["cta_work_per_sm"] == pytest.approx(4 / 132)
    assert report["engines"]["flashinfer"]["useful_kv_mib"] == pytest.approx(20001 * 2 * 4 * 64 * 2 / 2**20)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--family", "normal"], "family: expected one of uniform"),
        (["--device", "b999"], "device: expected one of a10, a100_40gb"),
        (["--policy", "best"], "policy: expected one of calibrated, paper, oracle, flashinfer_cuda_core"),
        (["--requests", "0"], "requests: expected an integer in [1, 1000000], got 0"),
        (["--requests", "9999999999"], "requests: expected an integer in [1, 1000000], got 9999999999"),
        (["--layers", str(10**20)], f"layers: expected an integer in [1, 2147483647], got {10**20}"),
        (["--window", "0"], "window: expected an integer in [1, 2147483647], got 0"),
        (["--query-tokens", "9"], "query_tokens: expected an integer in [1, 8], got 9"),
        (["--policy", "paper", "--window", "9"], "options: expected plain attention with the policy paper, got"),
        (["--steps", "0"], "steps: expected"),
        (["--steps", str(10**20)], f"steps: expected an integer in [1, 2147483647], got {10**20}"),
        (["--max-active", str(10**20)], f"max_active: expected an integer in [1, 2147483647], got {10**20}"),
        (["--policy", "paper", "--min-context", str(10**20)], "min_context: expected an integer in [0, 2147483647]"),
        (["--max-active", "-3"], "max_active: expected"),
        (["--seed", "-1"], "seed: expected"),
        (["--num-kv-heads", "5"], "num_q_heads: expected a multiple of num_kv_heads = 5, got 32"),
        (["--hole-fraction", "1"], "hole_fraction: expected a number in [0, 1), got 1.0"),
        (["--split-splits", "0"], "split_splits: expected"),
        (["--trace-file", "nowhere.csv"], "nowhere.csv: cannot read: No such file"),
        (["--steps", "many"], "--steps"),
        (["--colour"], "--colour"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message):
    done = pkvsim("replay", *args)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("pkvsim: error: ")
    assert message in done.stderr


def test_no_command():
    done = pkvsim()
    assert (done.returncode, done.stderr) == (2, "pkvsim: error: Missing command.\n")


def test_help():
    assert pkvsim("--help").returncode == pkvsim("replay", "--help").returncode == 0
    assert "replay" in pkvsim("--help").stdout


def test_a_second_replay_compiles_nothing(tmp_path):
    def compiled():
        done = pkvsim(*PAPER_RUN, "--policy", "paper", NUMBA_CACHE_DIR=str(tmp_path))
        assert done.returncode == 0
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}

    first = compiled()
    assert len([path for path in first if path.suffix == ".nbc"]) <= MOST_COMPILED
    assert compiled() == first
