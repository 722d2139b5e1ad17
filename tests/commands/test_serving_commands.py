"""whatif and sweep on a load that is made up."""
import json

import pytest
from command import pkvsim

LOAD = ("--input-tokens", "100-300", "--output-tokens", "20", "--requests", "60")
SERVER = ("--device", "h200", "--model", "llama-3.1-8b")


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *args: pkvsim(capsys, monkeypatch, *args)


def whatif(run, *args):
    code, out, err = run("whatif", *SERVER, "--policies", "balanced", *args, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_whatif_needs_no_file(run):
    told = whatif(run, *LOAD, "--rate", "4")
    assert told["policies"]["balanced"]["finished"] == 60 and told["notes"][0].startswith("made up, seed 0: 4 requests")
    slow, fast = (whatif(run, *LOAD, "--concurrency", str(n))["policies"]["balanced"] for n in (1, 8))
    assert slow["mean_rows"] == pytest.approx(1) and 6 < fast["mean_rows"] <= 8
    assert fast["tokens_per_s"] > 3 * slow["tokens_per_s"] and not fast["saturated"]


def test_turns_wait_for_answers(run):
    turns = ("--turns", "5", "--think-time", "10")
    together = whatif(run, *LOAD, *turns, "--prefix-cache", "lru")["policies"]["balanced"]
    assert 40 < together["makespan_s"] < 50 and together["prefix_hit_share"] > 0.4  # four pauses of 10 s


def test_a_sweep_needs_no_file(run):
    code, out, err = run("sweep", *SERVER, *LOAD, "--rate", "9", "--over", "max_batch=1,8", "--policy", "balanced", "--json")
    one, eight = (cell["result"] for cell in json.loads(out)["cells"])
    assert (code, err) == (0, "") and one["ttft_s"]["p90"] > eight["ttft_s"]["p90"]
    code, out, err = run("sweep", "--rate", "9", "--over", "batch=1,8")
    assert code == 2 and "rate: means something with a trace alone" in err
    code, out, err = run("whatif", *SERVER)
    assert code == 2 and "expected a request trace, or --input-tokens and --output-tokens" in err


def test_an_order_and_a_line_for_every_request(run, tmp_path):
    path = tmp_path / "requests.csv"
    whatif(run, *LOAD, "--rate", "4", "--order", "shortest", "--requests-csv", str(path))
    lines = [line.split(",") for line in path.read_text().splitlines()]
    assert len(lines) == 61 and lines[0][:4] == ["policy", "request", "session", "arrival_s"]
    first = dict(zip(lines[0], lines[1]))
    assert (first["policy"], first["request"], first["output_tokens"], first["rejected"]) == ("balanced", "0", "20", "")
    assert float(first["e2e_s"]) == pytest.approx(float(first["ttft_s"]) + 19 * float(first["tpot_s"]), rel=1e-6)
    for args, message in (
        (("--requests-csv", "x.txt"), "requests_csv: expected a file ending in .csv"),
        (("--order", "lifo"), "order: expected one of fcfs, shortest, batchllm, kvshare, continuum, got 'lifo'"),
    ):
        code, out, err = run("whatif", *SERVER, *LOAD, *args)
        assert code == 2 and message in err


def test_two_servers_share_the_load(run):
    one, two = (
        whatif(run, *LOAD, "--replicas", n, "--router", "least-tokens")["policies"]["balanced"] for n in ("1", "2")
    )
    assert sum(part["requests"] for part in two["replicas"]) == 60 and len(one["replicas"]) == 1
    assert two["kv_pages"] == 2 * one["kv_pages"] and two["makespan_s"] < one["makespan_s"]
    code, out, err = run("sweep", *SERVER, *LOAD, "--over", "replicas=1,2", "--over", "router=round-robin,prefix", "--json")
    assert (code, err) == (0, "") and len(json.loads(out)["cells"]) == 4
    code, out, err = run("whatif", *SERVER, *LOAD, "--replicas", "2", "--timeline", "x.json")
    assert code == 2 and "timeline: expected one server" in err


def test_tiers_behind_the_gpu(run, tmp_path):
    """Conversations whose KV leaves a small HBM come back from host memory and disk."""
    load = ("--input-tokens", "600", "--output-tokens", "20", "--requests", "60", "--turns", "4", "--think-time", "5",
            "--rate", "2", "--kv-gib", "0.5", "--prefix-cache", "lru")  # fmt: skip
    tiers, timeline = ("--tier", "host:1GiB:50", "--tier", "disk:64GiB:7"), tmp_path / "lanes.json"
    told = whatif(run, *load, *tiers, "--placement", "equal", "--timeline", str(timeline),
                  "--requests-csv", str(tmp_path / "requests.csv"))
    rows = [line.split(",") for line in (tmp_path / "requests.csv").read_text().splitlines()]
    loaded = [int(row[rows[0].index("loaded_tokens")]) for row in rows[1:]]
    found, without = told["policies"]["balanced"], whatif(run, *load)["policies"]["balanced"]
    assert found["tiers"]["loaded_tokens"] > 10_000 and found["ttft_s"]["p50"] < without["ttft_s"]["p50"]
    assert sum(loaded) == found["tiers"]["loaded_tokens"] and len(loaded) == 60
    assert set(found["tiers"]["devices"]) == {"host", "disk"} and "tiers" not in without
    assert told["config"]["tiers"]["placement"] == "equal"
    assert any(note.startswith("KV beyond HBM: host 1 GiB at 50 GB/s") for note in told["notes"])
    events = json.loads(timeline.read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    loads = [event for event in events if event["ph"] == "X" and lanes[event["tid"]] == "disk reads"]
    assert sum(event["args"]["bytes"] for event in loads) == found["tiers"]["devices"]["disk"]["read_bytes"] > 0
    code, out, err = run("whatif", *SERVER, *load, *tiers, "--policies", "balanced")
    assert code == 0 and "blocked by disk p99" in out and "TTFT load p99" in out
    sweep = ("sweep", *SERVER, *load, "--policy", "balanced", "--json")
    code, out, err = run(*sweep, "--over", "tiers=none,host:1GiB:50+disk:64GiB:7", "--over", "load_or_recompute=price,recompute")
    none, _, priced, recomputed = (cell["result"] for cell in json.loads(out)["cells"])
    assert priced["tiers"]["loaded_tokens"] == pytest.approx(found["tiers"]["loaded_tokens"], rel=0.2)
    assert recomputed["ttft_s"] == none["ttft_s"] and recomputed["tiers"]["loads"] == 0
    code, out, err = run(*sweep, "--over", "tiers=serial_files,host:1GiB:50", "--load-or-recompute", "load", "--reads-at-once")
    assert code == 0 and "placed by in_order, all at once" in out and "tiers: all that is there is loaded" in out
    for args, message in (
        (("--tier", "nvme"), "tier: expected NAME:CAPACITY:READ[:WRITE], or one of unified_pool, serial_files, got"),
        (("--retention", "belady"), "retention: expected only with --tier"),
        ((*tiers, "--retention", "mru"), "retention: expected one of lru, belady, got 'mru'"),
        ((*tiers, "--replicas", "2"), "tier: expected one server, got replicas 2"),
    ):
        code, out, err = run("whatif", *SERVER, *load, *args)
        assert code == 2 and message in err
    code, out, err = run(*sweep, "--over", "max_batch=8,16", "--placement", "equal")
    assert code == 2 and "placement: expected only with --tier" in err
