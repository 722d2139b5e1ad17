"""The order of a calibration run and what it leaves, with a GPU that is made up."""
import contextlib
import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpu.calibrate.cells import calibration_cells, sweep_cells
from gpu.calibrate.run import calibrate, measure_cells, parse_args, time_steps
from gpu.measure.memory import NoRoom
from pkvsim.devices.device import get_device
from pkvsim.devices.route_model import ROUTES
from pkvsim.fitting.fit_routes import predict_us
from pkvsim.fitting.fit_steps import HOST_CONSTANTS
from pkvsim.fitting.measured_tables import read_measurements
from pkvsim.fitting.measurements import Measurement

H200 = get_device("h200")


class FakeCalibrator:
    """Knows one route; the largest cells do not fit its pool."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def steps(self, cell):
        self.calls.append("steps")
        self._check(cell)
        host = SimpleNamespace(wall_us=50.0, plan_us=5.0, run_us=9.0)
        return {("balanced", None): SimpleNamespace(event_us=20.0, host=host)}

    def measure(self, cell, steps=None):
        self.calls.append("measure")
        self._check(cell)
        step = (steps or {}).get(("balanced", None))
        event_us = step.event_us if step else None
        yield Measurement(route="balanced", shape=cell.shape, seq_lens=cell.seq_lens, kernel_us=15.0, event_us=event_us)

    def _check(self, cell) -> None:
        if cell.kv_bytes > 1 << 30:
            raise NoRoom("pool-gib: expected more")


def run(tmp_path: Path, *options: str, started: float = float("inf")):
    args = parse_args(["--quick", *options])
    calibrator, path = FakeCalibrator(), tmp_path / "here.csv"
    steps = time_steps(args, calibrator, started)
    return calibrator, steps, measure_cells(args, calibrator, steps, path, started), path


def test_whole_steps_come_before_any_graph(tmp_path):
    calibrator, steps, measurements, path = run(tmp_path)
    assert calibrator.calls == ["steps"] * len(steps) + ["measure"] * len(steps)
    assert 0 < len(measurements) < len(steps) and {} in steps  # some did not fit
    assert read_measurements(path) == measurements and all(m.event_us == 20 for m in measurements)


def test_a_run_out_of_time_keeps_what_it_has(tmp_path):
    calibrator, steps, measurements, _ = run(tmp_path, "--time-limit", "1", started=float("-inf"))
    assert (calibrator.calls, steps, measurements) == ([], [], [])


def test_other_errors_end_the_run(tmp_path):
    calibrator = FakeCalibrator()
    calibrator._check = lambda cell: (_ for _ in ()).throw(ValueError("seq_lens: wrong"))
    with pytest.raises(ValueError, match="seq_lens: wrong"):
        time_steps(parse_args(["--quick"]), calibrator, float("inf"))


def test_only_the_routes_asked_for_are_timed(monkeypatch):
    """Cells without one of them are not even laid out."""
    pytest.importorskip("torch", reason="torch is not installed")
    measure = pytest.importorskip("gpu.calibrate.measure")
    laid_out = []
    monkeypatch.setattr(measure, "available_routes", lambda shape: ROUTES)
    monkeypatch.setattr(measure, "lay_out", lambda pool, shape, lens, *, seed: laid_out.append(lens) or 1 / 0)
    routes = parse_args(["--routes", "xqa, balanced"]).routes
    assert routes == ("xqa", "balanced")
    calibrator = measure.Calibrator(None, None, repeats=1, say=print, routes=routes)
    ours, anyones = sweep_cells()[0], calibration_cells(quick=True)[0]
    assert calibrator.steps(ours) == {} == calibrator.steps(ours) and list(calibrator.measure(ours)) == []
    assert not laid_out
    with pytest.raises(ZeroDivisionError):
        calibrator.steps(anyones)
    assert len(laid_out) == 1


@pytest.mark.parametrize("options, said", [
    (["--routes", "split,fast"], "expected some of flashinfer_cuda_core, .*, got 'fast'"),
    (["--keep-host"], "--keep-host: expected a --device-base"),
    (["--device-base", "h2000"], "--device-base: device: expected one of"),
])
def test_options_that_are_refused(options, said, capsys):
    with pytest.raises(SystemExit):
        parse_args(options)
    assert re.search(said, capsys.readouterr().err)


class OwnRoutes(FakeCalibrator):
    """Times that the H200's own model gives, a tenth longer, beside a host of its own."""

    def __init__(self, pool, limit, *, repeats, say, routes) -> None:
        super().__init__()
        self.unavailable, self.routes = {}, routes

    def steps(self, cell):
        host = SimpleNamespace(wall_us=5000.0, plan_us=900.0, run_us=90.0)
        return {timing: SimpleNamespace(event_us=20.0, host=host) for timing in cell.timings(self.routes)}

    def measure(self, cell, steps=None):
        for route, splits in cell.timings(self.routes):
            one = Measurement(route=route, shape=cell.shape, seq_lens=cell.seq_lens, splits=splits, kernel_us=1.0)
            us = 1.1 * float(predict_us(H200.routes[route], [one], num_sms=132)[0])
            host = steps[route, splits].host
            yield replace(one, kernel_us=us, event_us=us + 2, plan_us=host.plan_us, wall_us=host.wall_us,
                          run_us=host.run_us)


def test_a_known_device_keeps_what_is_not_timed(monkeypatch, tmp_path):
    """From the options to the file, which differs from the catalogue's in one route's GPU part alone."""
    pytest.importorskip("torch", reason="torch is not installed")
    about = dict.fromkeys(("gpu", "driver", "cuda", "cupy", "torch", "flashinfer", "command"), "known") | {
        "date": "2026-12-01T10:00:00+00:00"}
    for module, name, fake in (
        ("gpu.calibrate.measure", "Calibrator", OwnRoutes),
        ("gpu.measure.pools", "BenchPool", lambda **how: SimpleNamespace(flat=None)),
        ("gpu.measure.timing", "StreamLimit", lambda flat: None),
        ("gpu.measure.timing", "shared_stream", contextlib.nullcontext),
        ("gpu.measure.memory", "budget", lambda *how: SimpleNamespace(granted_gib=1)),
        ("gpu.measure.memory", "peak_line", lambda: "peak"),
        ("gpu.calibrate.run", "environment", lambda: about),
    ):
        monkeypatch.setattr(importlib.import_module(module), name, fake)
    out, report = tmp_path / "h200.json", tmp_path / "report.json"
    calibrate(parse_args(["--quick", "--routes", "workqueue", "--device-base", "h200", "--keep-host", "-o", str(out),
                          "--json", str(report)]))
    made, old = json.loads(out.read_text()), json.loads(H200.to_json())
    one, other = made["routes"].pop("workqueue"), old["routes"].pop("workqueue")
    assert made == old and list(json.loads(report.read_text())["routes"]) == ["workqueue"]
    assert "; the host's times: " in one["source"]
    assert one["date"] == "2026-12-01" and one["in_sample"]["mean_percent"] < 1
    assert all(one["model"][name] == other["model"][name] for name in HOST_CONSTANTS)
    assert one["model"]["isolated_us"] == 2 and one["model"]["bandwidth_gb_s"] < 0.95 * other["model"]["bandwidth_gb_s"]
    assert {m.route for m in read_measurements(tmp_path / "h200.csv")} == {"workqueue"}
