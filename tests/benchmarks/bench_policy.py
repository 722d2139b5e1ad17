"""What deciding a step and simulating one cost, on the machine at hand; not part of the tests.

    .venv/bin/python -m pytest -n 0 tests/benchmarks/bench_policy.py

Steps cycle through lengths that change, so that nothing but what depends on the shape is found in a cache.
"""
from __future__ import annotations

from itertools import cycle

import numpy as np
import pytest

from pkvsim import DecodeShape
from pkvsim.devices.device import get_device
from pkvsim.devices.route_model import ROUTES
from pkvsim.policy.by_name import CalibratedPolicy, OraclePolicy
from pkvsim.timeline.timeline import simulate

H200 = get_device("h200")
SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)


def steps(rows: int) -> list[np.ndarray]:
    lens = np.random.default_rng(rows).integers(1000, 60000, rows)
    return [(lens + step).astype(np.int32) for step in range(64)]


@pytest.mark.parametrize("rows", [1, 8, 32, 64, 256])
def test_decide(benchmark, rows):
    policy, lens = CalibratedPolicy(), cycle(steps(rows))
    policy.decide(SHAPE, next(lens), H200)
    benchmark(lambda: policy.decide(SHAPE, next(lens), H200))


@pytest.mark.parametrize("rows", [8, 64])
def test_oracle(benchmark, rows):
    policy, lens = OraclePolicy(), cycle(steps(rows))
    policy.decide(SHAPE, next(lens), H200)
    benchmark(lambda: policy.decide(SHAPE, next(lens), H200))


@pytest.mark.parametrize("route", ROUTES)
def test_timeline_of_256_rows(benchmark, route):
    lens = cycle(steps(256))
    model = H200.routes[route]
    simulate(model, SHAPE, next(lens), num_sms=H200.num_sms)
    benchmark(lambda: simulate(model, SHAPE, next(lens), num_sms=H200.num_sms))
