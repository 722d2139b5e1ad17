"""The measuring scripts on small cases: right results, every figure there and sane, wrong engines found out."""
from __future__ import annotations

import json

import numpy as np
import pytest
import serving_trace
import torch
from serving.check import row_attention
from serving.engines import build_engines, make_step
from serving.options import equal_buckets
from serving.report import all_tables
from serving.run import run_trace

from gpu.calibrate.cells import CalibrationCell
from gpu.calibrate.constants import device_spec, measure_constants
from gpu.calibrate.measure import Calibrator
from gpu.measure.environment import environment
from gpu.measure.pools import BenchPool
from gpu.measure.timing import StreamLimit, shared_stream
from gpu.routes.route_engines import available_routes
from pkvsim import DecodeShape
from pkvsim.devices.device import get_device, load_device
from pkvsim.devices.route_model import OWN_ROUTES
from pkvsim.traces.paper_families import make_trace

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
POOL_GIB = 3.0


@pytest.fixture(scope="module")
def bench():
    args = serving_trace.parse_args(["--device", "h200", "--pool-gib", str(POOL_GIB), "--repeats", "1"])
    return serving_trace.make_bench(args)


@pytest.fixture(scope="module")
def trace():
    return make_trace("small", 5, [700, 5000, 64], [3, 4, 3], [0, 0, 1], max_active=2, steps=4, page_size=16)


@pytest.mark.parametrize("layers", (1, 3))
def test_a_trace_is_checked_and_timed_on_every_engine(bench, trace, layers) -> None:
    from dataclasses import replace

    bench = replace(bench, layers=layers)
    engines = build_engines(
        SHAPE, "float16", (*available_routes(SHAPE), "adaptive"), device=bench.device, layers=layers
    )
    record = run_trace(bench, engines, trace, label="B2")
    assert not record["wrong"], record["wrong"]
    assert set(OWN_ROUTES) <= set(record["engines"]) and len(record["decisions"]) == 4
    for name, times in record["engines"].items():
        assert all(len(values) == 4 and min(values) > 0 for values in times.values()), name
    assert max(error["float64_error"] for error in record["errors"].values()) < 2e-3
    json.dumps(record)
    assert len(all_tables([record], exhaustive=True)) >= 5


def test_row_attention_is_float64_attention(bench) -> None:
    k_pages, v_pages = bench.pool.pages(SHAPE)
    lens = np.array([77, 16], np.int32)
    table = np.random.default_rng(0).permutation(len(k_pages))[:10].astype(np.int32).reshape(2, 5)
    step = make_step(SHAPE, lens, table, {}, dtype=torch.float16)
    for row, length in enumerate(lens.tolist()):
        keys, values = (
            torch.cat([pool[page] for page in table[row].tolist()], dim=1)[:, :length].double()
            for pool in (k_pages, v_pages)
        )  # [Hkv, length, d]
        query = step.q[row].double().view(8, 4, 128)
        expected = torch.softmax(query @ keys.transpose(1, 2) / 128**0.5, dim=-1) @ values
        assert torch.allclose(row_attention(step, row, k_pages, v_pages), expected.reshape(32, 128), atol=1e-9)


def test_a_wrong_engine_of_ours_stops_the_run(bench, trace) -> None:
    engines = build_engines(SHAPE, "float16", ("balanced", "workqueue"), device=bench.device, layers=1)
    right = engines.engines["workqueue"].engine.run

    class Wrong:
        plan = engines.engines["workqueue"].engine.plan

        def run(self, run):
            right(run)
            run.out.add_(0.01)

    engines.engines["workqueue"].engine = Wrong()
    with pytest.raises(RuntimeError, match="workqueue: .*float64_error"):
        run_trace(bench, engines, trace, label="B2")


def test_equal_buckets_run(bench) -> None:
    engines = build_engines(SHAPE, "float16", ("balanced",), device=bench.device, layers=1)
    record = run_trace(bench, engines, equal_buckets(1, 4, page_size=16), label="B1")
    assert record["kv_mib"] == [32.0, 64.0, 128.0, 256.0]


def test_constants_and_cells_of_the_calibration(tmp_path) -> None:
    pool = BenchPool(pool_gib=POOL_GIB, dtype=torch.float16, seed=1)
    limit, said = StreamLimit(pool.flat), []
    measured = measure_constants(pool.flat, limit, quick=True, say=said.append)
    spec = device_spec(measured, environment=environment(), name="here")
    path = tmp_path / "here.json"
    path.write_text(spec.to_json())
    assert load_device(path).beta_gb_s == spec.beta_gb_s and 0.3 < spec.beta_gb_s / spec.peak_gb_s < 1.1
    assert spec.cta_read_gb_s < spec.beta_gb_s and measured.graph_kernel_us < measured.graph_replay_us
    calibrator = Calibrator(pool, limit, repeats=1, say=said.append)
    cell = CalibrationCell("test", SHAPE, (3000, 40, 900), splits=(1, 4))
    with shared_stream():
        found = list(calibrator.measure(cell, calibrator.steps(cell)))
    assert {(m.route, m.splits) for m in found if m.route in OWN_ROUTES} == {
        ("balanced", None),
        ("split", 1),
        ("split", 4),
        ("workqueue", 1),
        ("workqueue", 4),
    }
    assert all(m.kernel_us > 0 and m.plan_us > 0 and m.run_us > 0 and m.wall_us > m.event_us > 0 for m in found)
    with pytest.raises(ValueError, match="^pool-gib"):
        list(calibrator.measure(CalibrationCell("test", SHAPE, (65536,) * 32)))


def test_the_h200_is_calibrated() -> None:
    assert set(get_device("h200").routes) >= set(OWN_ROUTES)
