"""pkvsim whatif --lend and pkvsim step --kv-parallel on the command line."""
from __future__ import annotations

import json

import pytest
from command import pkvsim

LOAD = ("whatif", "--input-tokens", "100-300", "--output-tokens", "50-300", "--requests", "40", "--device", "h200",
        "--kv-gib", "0.2")


def test_every_way_is_a_line(capsys, monkeypatch) -> None:
    code, out, _ = pkvsim(capsys, monkeypatch, *LOAD, "--replicas", "3", "--lend", "all", "--json")
    found = json.loads(out)
    assert code == 0 and [way["way"] for way in found["ways"]] == ["borrow", "preempt", "move", "recompute"]
    assert found["pages"] == 102 and all(way["served"] == 40 for way in found["ways"])
    assert found["ways"][0]["borrowed_pages"] > 0 and found["ways"][1]["swaps"] > 0
    code, out, _ = pkvsim(capsys, monkeypatch, *LOAD, "--replicas", "3", "--lend", "move,borrow")
    assert code == 0 and out.index("move ") < out.index("borrow ") and "assumptions" in out


@pytest.mark.parametrize(("more", "said"), [
    (("--lend", "steal", "--replicas", "2"), "lend: expected some of borrow"),
    (("--lend", "borrow,borrow", "--replicas", "2"), "lend: expected some of borrow"),
    (("--lend", "borrow"), "replicas: expected"),
    (("--lend", "borrow", "--replicas", "2", "--requests-csv", "x.csv"), "requests_csv: expected None with --lend"),
    (("--lend", "borrow", "--replicas", "2", "--policies", "paper"), "policies: expected None with --lend"),
    (("--lend", "borrow", "--replicas", "2", "--kv-parallel", "2"), "kv_parallel: expected 1 with --lend, got 2"),
    (("--lend", "borrow", "--replicas", "2", "--kv-dtype", "int8"), "kv_dtype: expected None with --lend, got int8"),
    (("--lend", "borrow", "--replicas", "2", "--prefix-cache", "lru"), "prefix_cache: expected none with --lend"),
    (("--lend", "borrow", "--replicas", "2", "--engine", "vllm"), "engine: expected pkv with --lend, got vllm"),
    (("--lend", "borrow", "--replicas", "2", "--query-tokens", "2", "--acceptance", "0.5"), "query_tokens: expected 1"),
    (("--lend", "borrow", "--replicas", "2", "--tier", "host:1GiB:50"), "tiers: expected None with --lend, got some"),
    (("--lend", "borrow", "--prefill-replicas", "1"), "prefill_replicas: expected 0 with --lend"),
])
def test_what_lend_refuses(capsys, monkeypatch, more, said) -> None:
    code, _, err = pkvsim(capsys, monkeypatch, *LOAD, *more)
    assert code == 2 and said in err


def test_only_models_that_the_kernel_serves_borrow(capsys, monkeypatch) -> None:
    """Windows have no kernel over several GPUs; the other ways need none."""
    load = (*LOAD, "--model", "gpt-oss-20b", "--replicas", "2")
    code, _, err = pkvsim(capsys, monkeypatch, *load, "--lend", "all")
    assert code == 2 and "lend: expected some of preempt, move, recompute for layers with windows" in err
    assert pkvsim(capsys, monkeypatch, *load, "--lend", "preempt,move,recompute")[0] == 0


def test_a_step_over_gpus(capsys, monkeypatch, tmp_path) -> None:
    step = ("step", "--seq-lens", "65536,900x3", "--device", "h200", "--kv-parallel", "3")
    code, out, _ = pkvsim(capsys, monkeypatch, *step, "--json", "--plot", str(tmp_path / "step.svg"))
    found = json.loads(out)
    assert code == 0 and len(found["ranks"]) == 3 and found["attention_us"] < found["layer_us"]
    assert (tmp_path / "step.svg").read_text().count("GPU 2") > 0
    code, out, _ = pkvsim(capsys, monkeypatch, *step)
    assert code == 0 and "GPU 2: " in out and "one GPU with all pages" in out
    for more, said in (
        (("--routes", "xqa"), "routes: expected balanced"), (("--splits", "4"), "splits: expected None"),
        (("--kv-parallel", "0"), "kv_parallel: expected an integer in [1, 8], got 0"),
        (("--kv-parallel", "9"), "kv_parallel: expected an integer in [1, 8], got 9"),
    ):  # fmt: skip
        code, _, err = pkvsim(capsys, monkeypatch, *step, *more)
        assert code == 2 and said in err
