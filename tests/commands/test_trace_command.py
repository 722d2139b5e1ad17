"""pkvsim trace: what it prints, draws and refuses."""
import json
import subprocess
import sys

import pytest
from paths import ROOT
from trace_writers import azure, vidur

from pkvsim.traces.readers import read_requests


def pkvsim(*args):
    return subprocess.run([sys.executable, "-m", "pkvsim", "trace", *args], cwd=ROOT, capture_output=True, text=True)


def test_command(tmp_path):
    path = tmp_path / "day[1].csv"
    path.write_text(azure([(i * 700, 100 + i, 1 + i % 7) for i in range(50)]))
    shown = pkvsim(str(path), "--limit", "40")
    assert (shown.returncode, shown.stderr) == (0, "")
    for text in ("day[1]: 40 requests", "1.47 requests/s", "p99", "█", "note: first 40 of 50 requests"):
        assert text in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    printed = pkvsim(str(path), "--json", "--rate-scale", "2", "--jitter", "0.1", "--seed", "3")
    figures = json.loads(printed.stdout)
    assert figures["requests"] == 50 and figures["rate_per_s"] == pytest.approx(2.9, rel=0.05)
    assert printed.stdout == pkvsim(str(path), "--json", "--rate-scale", "2", "--jitter", "0.1", "--seed", "3").stdout


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plots_repeat(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    from pkvsim.reports.plot_trace import plot_trace

    path = tmp_path / "trace.csv"
    path.write_text(vidur([(i * 700, 100 + i, 1 + i % 7) for i in range(50)]))
    trace = read_requests(path)
    drawn = []
    for name in ("a", "b"):
        plot_trace(trace, tmp_path / f"{name}.{suffix}")
        drawn.append((tmp_path / f"{name}.{suffix}").read_bytes())
    assert drawn[0] == drawn[1] and len(drawn[0]) > 5000
    for bad, message in ((tmp_path / "x.gif", "ending in .png or .svg"), (tmp_path / "no" / "x.png", "cannot write")):
        with pytest.raises(ValueError, match=f"plot: .*{message}"):
            plot_trace(trace, bad)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none.csv"], "none.csv: cannot read: No such file"),
        (["GOOD", "--rate-scale", "0"], "rate_scale: expected a number in [1e-09, 1e+09], got 0.0"),
        (["GOOD", "--jitter", "nan"], "jitter_s: expected seconds in [0, 1e+09], got nan"),
        (["GOOD", "--limit", "0"], "limit: expected an integer in [1, 2147483647], got 0"),
        (["GOOD", "--seed", "-1"], "seed: expected an integer in [0, 18446744073709551615], got -1"),
        (["GOOD", "--plot", "x.gif"], "plot: expected a file ending in .png or .svg, got 'x.gif'"),
        ([], "expected a request trace"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, args, message):
    path = tmp_path / "good.csv"
    path.write_text(vidur([(0, 1, 1), (3000, 2, 2)]))
    done = pkvsim(*(str(path) if arg == "GOOD" else arg for arg in args))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and message in done.stderr
