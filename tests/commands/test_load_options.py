"""Options that say where requests come from: on the command line, and refused where they say nothing."""
import json

import pytest
from command import azure_trace, pkvsim

from pkvsim.commands.options.server import ServerOptions

LOAD = ("--input-tokens", "100-300", "--output-tokens", "20")


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *args: pkvsim(capsys, monkeypatch, "trace", *args)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "day.csv"
    path.write_text(azure_trace(20))
    return str(path)


def test_a_made_up_load(run):
    code, out, err = run(*LOAD, "--rate", "4", "--arrivals", "gamma:0.5", "--requests", "300", "--json")
    figures = json.loads(out)
    assert (code, err, figures["requests"]) == (0, "", 300) and 100 <= figures["prompt"]["mean"] <= 300
    assert figures["notes"] == ["made up, seed 0: 4 requests/s, gamma 0.5"]
    code, out, _ = run(*LOAD, "--turns", "3", "--think-time", "exponential:mean=5", "--concurrency", "8", "--json")
    figures = json.loads(out)
    assert (figures["requests"], figures["sessions"], figures["concurrency"]) == (1000, 334, 8)
    assert figures["follow_ups"] == 1000 - 334 and 0.4 < figures["prefix_reuse"] < 0.8


def test_a_file_at_another_rate_and_in_a_closed_loop(run, file):
    figures = json.loads(run(file, "--rate", "5", "--json")[1])
    assert figures["rate_per_s"] == pytest.approx(5) and "arrival rate scaled" in figures["notes"][0]
    figures = json.loads(run(file, "--concurrency", "4", "--json")[1])
    assert (figures["duration_s"], figures["concurrency"]) == (0, 4)
    figures = json.loads(run(file, "--concurrency", "4", "--rate", "2", "--json")[1])
    assert figures["rate_per_s"] == pytest.approx(2) and figures["concurrency"] == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "trace: expected a request trace, or --input-tokens and --output-tokens in place of one"),
        (("--input-tokens", "5"), "output_tokens: expected, as a load without a file needs both lengths"),
        (("FILE", "--turns", "3"), "turns: expected only with a load without a file"),
        (("FILE", *LOAD), "input_tokens: expected only with a load without a file"),
        (("FILE", "--rate", "nan"), "rate: expected requests per second > 0, got nan"),
        (("FILE", "--limit", "1", "--rate", "3"), "rate: day has all requests at one time"),
        (("FILE", "--time-unit", "ms"), "day.csv has dates and times, which need none"),
        ((*LOAD, "--time-unit", "ms"), "time_unit: expected only with a trace file"),
        ((*LOAD, "--arrivals", "constant"), "arrivals: expected only with --rate"),
        ((*LOAD, "--think-time", "3"), "think_time: expected only with --turns"),
        ((*LOAD, "--rate", "3", "--arrivals", "x"), "arrivals: expected poisson, constant, or gamma:BURSTINESS"),
        ((*LOAD, "--concurrency", "0"), "concurrency: expected an integer in [1, 2147483647], got 0"),
    ],
)
def test_refusals_are_one_line(run, file, args, message):
    code, out, err = run(*(file if arg == "FILE" else arg for arg in args))
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err


def test_the_seed_draws_drafts_too_and_is_named_where_it_is_none():
    for server in (ServerOptions(), ServerOptions(query_tokens=4, acceptance=0.5)):
        assert server.config(7).draft_seed == 7
        with pytest.raises(ValueError, match=r"^seed: expected an integer in \[0, .* got -1"):
            server.config(-1)
