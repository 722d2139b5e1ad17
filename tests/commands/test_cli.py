"""The pkvsim command as a user runs it."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from paths import ROOT

from pkvsim import __version__, cli
from pkvsim.compiled.notice import NOTICE
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
    """A run of the command; a first one's notice that it compiles is left out of stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "pkvsim", *args],
        cwd=cwd, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100", **environment},
    )  # fmt: skip
    done.stderr = done.stderr.replace(NOTICE + "\n", "")
    return done


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
        (["--policy", "best"], "policy: expected one of paper, calibrated, oracle, flashinfer, flashinfer_cuda_core"),
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


def test_help():
    bare, asked = pkvsim(), pkvsim("--help")
    assert (bare.returncode, bare.stderr) == (asked.returncode, asked.stderr) == (0, "")
    assert bare.stdout == asked.stdout and "replay" in bare.stdout and "--version" in bare.stdout
    assert pkvsim("replay", "--help").returncode == 0


def test_version():
    done = pkvsim("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"pkvsim {re.escape(__version__)} \(Python [\d.]+\S*, Numba \d\S+\)\n", done.stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    shown = pkvsim(_PKVSIM_COMPLETE=f"source_{shell}")
    assert shown.returncode == 0 and "_PKVSIM_COMPLETE" in shown.stdout
    completed = pkvsim(_PKVSIM_COMPLETE="complete_bash", COMP_WORDS="pkvsim wha", COMP_CWORD="1")
    assert (completed.returncode, completed.stdout.split()) == (0, ["whatif"])


@pytest.mark.slow
# Little output and much, tables and JSON: what fails early and what fails as the program ends.
@pytest.mark.parametrize("args", ["devices", "devices --json", "step --seq-lens 8x2", "step --seq-lens 8x2 --json", ""])
def test_output_that_cannot_be_written(args):
    command = [sys.executable, "-m", "pkvsim", *args.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    said = done.stderr.replace(NOTICE + "\n", "")
    assert (done.returncode, said) == (1, "pkvsim: error: cannot write the output: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -1` does when it has its line
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(("args", "closed", "said"), [
    ("devices", "stdout", "cannot write the output: standard output is closed"),
    ("trace -", "stdin", "standard input: cannot read: it is closed"),
])  # fmt: skip
def test_a_stream_that_the_shell_has_closed(args, closed, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pkvsim", *args.split()])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, closed, None)
        cli.main()
    assert stopped.value.code and capsys.readouterr().err == f"pkvsim: error: {said}\n"


def test_an_interrupted_run_is_one_line():
    program = (
        "import sys, time, pkvsim.devices.device as device, pkvsim.cli as cli\n"
        "def wait(name):\n    print('waits', flush=True)\n    time.sleep(60)\n"
        "device.get_device = wait\nsys.argv = ['pkvsim', 'devices', 'l4']\ncli.main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    ) as running:  # fmt: skip
        assert running.stdout.readline() == "waits\n"
        time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 128 + signal.SIGINT
        assert running.stderr.read() == "pkvsim: error: interrupted\n"


def test_a_first_run_says_that_it_compiles(monkeypatch, capsys):
    from types import SimpleNamespace

    from pkvsim.compiled import notice

    seconds = iter([0.0, 0.5, 1.5, 2.5])
    monkeypatch.setattr(notice.time, "monotonic", lambda: next(seconds))
    listener = notice._Notice()
    for module in ("elsewhere.price", "pkvsim.pricing", "pkvsim.pricing", "pkvsim.pricing", "pkvsim.pricing"):
        function = SimpleNamespace(py_func=SimpleNamespace(__module__=module))
        listener.on_start(SimpleNamespace(data={"dispatcher": function}))
    assert capsys.readouterr().err == NOTICE + "\n"


def test_a_second_replay_compiles_nothing(tmp_path):
    def compiled():
        done = pkvsim(*PAPER_RUN, "--policy", "paper", NUMBA_CACHE_DIR=str(tmp_path))
        assert done.returncode == 0
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}

    first = compiled()
    assert len([path for path in first if path.suffix == ".nbc"]) <= MOST_COMPILED
    assert compiled() == first
