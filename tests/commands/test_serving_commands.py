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
