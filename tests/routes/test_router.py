"""The router's choices, on engines that only note what they are asked."""
from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu.inputs.run import Run
from gpu.routes import route_engines as routes
from gpu.routes import router as router_module
from gpu.routes.router import Router
from pkvsim import DecodeShape
from pkvsim.devices.device import get_device
from pkvsim.devices.route_model import OWN_ROUTES, ROUTES
from pkvsim.devices.route_options import serving_routes
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.policy.by_name import CalibratedPolicy, FixedPolicy, PaperPolicy
from pkvsim.policy.decision import Decision

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
H200 = get_device("h200")
LENGTHS = st.lists(st.one_of(st.just(0), st.integers(1, 200), st.integers(1, 70000)), min_size=1, max_size=40)


class FakeEngine:
    """Keeps its plans; `run` gives the route's name."""

    def __init__(self, route: str) -> None:
        self.route, self.plans = route, []

    def plan(self, tables, *, splits=None, packed=None, validate=False) -> None:
        self.plans.append((tables.seq_lens, splits))

    def run(self, run):
        self.sinks = run.sinks
        return self.route, run.lse


class Built(dict):
    """A build function that remembers its engines, and cannot build some routes."""

    def __init__(self, *broken: str) -> None:
        super().__init__()
        self.broken = broken

    def __call__(self, route, shape, dtype, *, scale, options, layout):
        if route in self.broken:
            raise routes.RouteUnavailable(f"{route}: no kernel")
        assert route not in self, "engines are built once"
        self[route] = FakeEngine(route)
        return self[route]


class CountingPolicy:
    """The calibrated policy, counting what it is asked."""

    def __init__(self) -> None:
        self.asked, self.policy = 0, CalibratedPolicy()

    def decide(self, *args, **options) -> Decision:
        self.asked += 1
        return self.policy.decide(*args, **options)


def make_router(build: Built, **options) -> Router:
    return Router(SHAPE, device=options.pop("device", H200), build=build, **options)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(routes.fi, "installed", lambda: True)


@pytest.fixture(autouse=True)
def forget_warnings():
    router_module._warn_once.cache_clear()


@settings(max_examples=60, deadline=None)
@given(lens=LENGTHS, layers=st.integers(1, 80), with_flashinfer=st.booleans(), needs_lse=st.booleans())
def test_the_routed_engine_is_the_policys_choice_among_the_available(lens, layers, with_flashinfer, needs_lse):
    lens, build = np.array(lens, np.int32), Built()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes.fi, "installed", lambda: with_flashinfer)
        router = make_router(build, layers=layers, needs_lse=needs_lse)
        router.plan(lens, np.zeros((len(lens), 1), np.int32))
    if not with_flashinfer or not lens.all():
        available = OWN_ROUTES  # empty rows: only our routes define their result
    else:
        available = tuple(route for route in ROUTES if route != "xqa" or not needs_lse)
    expected = CalibratedPolicy().decide(SHAPE, lens, H200, layers=layers, available=available)
    assert set(build) == {expected.route} and expected.route in available
    ((planned, splits),) = build[expected.route].plans
    assert planned.tolist() == lens.tolist()
    assert (splits is None) == (expected.splits is None)
    if splits is not None:
        assert splits.tolist() == expected.splits.tolist()
    assert router.counts == {expected.route: 1} and router.run(Run(None, None, lse=0))[0] == expected.route


OPTIONS = (PLAIN, AttentionOptions(window=4096), AttentionOptions(soft_cap=30.0), AttentionOptions(sinks=True),
           AttentionOptions(query_tokens=4), AttentionOptions(v_head_dim=64),
           AttentionOptions(window=128, sinks=True, query_tokens=2))


@settings(max_examples=60, deadline=None)
@given(lens=LENGTHS, options=st.sampled_from(OPTIONS), needs_lse=st.booleans(), layout=st.sampled_from(["HND", "NHD"]))
def test_options_reach_the_policy_and_leave_out_who_does_not_serve_them(lens, options, needs_lse, layout):
    lens, build = np.array(lens, np.int32), Built()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes.fi, "installed", lambda: True)
        router = make_router(build, options=options, layout=layout, needs_lse=needs_lse)
        router.plan(lens, np.zeros((len(lens), 1), np.int32))
    served = serving_routes(SHAPE, options)
    assert set(router.available) <= set(served) and set(OWN_ROUTES) <= set(router.available)
    if layout == "HND" and options.query_tokens == 1:
        assert set(router.available) == {route for route in served if route != "xqa" or not needs_lse}
    if layout == "NHD":
        assert router.available == OWN_ROUTES
    available = router.available if (lens >= options.query_tokens).all() else OWN_ROUTES
    expected = CalibratedPolicy().decide(SHAPE, lens, H200, available=available, options=options)
    assert set(build) == {expected.route}
    sinks = object()
    router.run(Run(None, None, lse=0, sinks=sinks))
    assert build[expected.route].sinks is sinks


@pytest.mark.parametrize("options, unserved", [
    (AttentionOptions(sinks=True), {"flashinfer_cuda_core": "sinks", "flashinfer_tensor_core": "sinks"}),
    (AttentionOptions(soft_cap=1.0), {"xqa": "soft_cap"}),
    (AttentionOptions(query_tokens=2), {"flashinfer_cuda_core": "query_tokens", "xqa": "query_tokens"}),
    (AttentionOptions(v_head_dim=64), dict.fromkeys(routes.BACKENDS, "v_head_dim")),
])
def test_the_reason_names_the_option(installed, options, unserved):
    missing = routes.missing_routes(SHAPE, options=options)
    assert set(missing) == set(unserved)
    assert all(option in missing[route] for route, option in unserved.items())
    assert all("NHD" in reason for reason in routes.missing_routes(SHAPE, layout="NHD").values())


def test_decisions_are_kept_for_lengths_alike_and_no_further():
    policy = CountingPolicy()
    router = make_router(Built(), policy=policy)
    for length in (4096, 4100, 4223):  # 4096 + 4096 / 32 is the next bucket
        router.plan([length, 100], None)
    assert policy.asked == 1
    router.plan([4224, 100], None)
    router.plan([4095, 100], None)
    router.plan([100, 4096], None)  # the rows' order is part of what splits are for
    assert policy.asked == 4


@settings(max_examples=60, deadline=None)
@given(
    lens=st.lists(st.integers(1, 100000), min_size=1, max_size=40), seed=st.integers(0, 9), layers=st.integers(1, 40)
)
def test_a_kept_decision_costs_little_where_lengths_differ(lens, seed, layers):
    """By the model itself, the route of other lengths alike in their first bits is at most 7 % above the cheapest."""
    lens = np.array(lens, np.int32)
    bucket = lens.astype(np.float32).view(np.int32) >> router_module.KEY_SHIFT
    low, high = ((bits << router_module.KEY_SHIFT).view(np.float32) for bits in (bucket, bucket + 1))
    other = np.ceil(low + np.random.default_rng(seed).random(len(lens)) * (high - low)).astype(np.int32) - 1
    other = np.maximum(other, np.ceil(low).astype(np.int32))
    policy = CalibratedPolicy()
    kept = policy.decide(SHAPE, lens, H200, layers=layers).route
    prices = policy.decide(SHAPE, other, H200, layers=layers).prices
    assert prices[kept] <= 1.07 * min(prices.values())


def test_only_the_last_decisions_are_kept(monkeypatch):
    monkeypatch.setattr(router_module, "KEPT_DECISIONS", 2)
    policy = CountingPolicy()
    router = make_router(Built(), policy=policy)
    for length in (100, 200, 100, 300, 100, 200):
        router.plan([length], None)
    assert policy.asked == 4  # 200 was the least recently used when 300 came


def test_missing_flashinfer_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(routes.fi, "installed", lambda: False)
    for _ in range(3):
        make_router(Built()).plan([5000], None)
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and "FlashInfer is not installed" in said[0].message and "xqa" in said[0].message


def test_a_route_that_cannot_be_built_is_named_and_left_out(installed, caplog):
    class FlashInferFirst(CalibratedPolicy):
        def decide(self, *args, available, **options):
            route = next(iter(available))
            return Decision(route, np.ones(1, np.int64), {}, "first")

    build = Built("flashinfer_cuda_core", "flashinfer_tensor_core")
    router = make_router(build, policy=FlashInferFirst())
    for _ in range(2):
        router.plan([5000], None)
    assert router.counts == {"split": 2} and set(build) == {"split"}
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert ["flashinfer_cuda_core: no kernel" in warnings[0], "flashinfer_tensor_core: no kernel" in warnings[1]] == [
        True
    ] * 2
    assert len(warnings) == 2


def test_lengths_on_the_gpu_alone_take_balanced(monkeypatch, installed):
    on_gpu = [70000] * 3  # stands for an array there
    monkeypatch.setattr(
        router_module, "_on_host", lambda lens, name="": None if lens is on_gpu else np.array(lens, np.int32)
    )
    policy, build = CountingPolicy(), Built()
    router = make_router(build, policy=policy)
    router.plan(on_gpu, None)
    assert router.decision.route == "balanced" and policy.asked == 0 and "GPU" in router.decision.reason
    assert build["balanced"].plans[0][0] is on_gpu
    for route, planned_with in (("workqueue", "host"), ("balanced", "gpu"), ("flashinfer_tensor_core", "host")):
        build = Built()
        router = make_router(build, policy=FixedPolicy(route))
        router.plan(on_gpu, None, host_seq_lens=[70000] * 3)
        planned, _ = build[route].plans[0]
        assert (planned is on_gpu) == (planned_with == "gpu"), route


@pytest.mark.parametrize("bad", [[-1], [1.5], "text", [[1], [1, 2]]])
def test_bad_lengths_on_the_host_are_named_as_given(bad):
    with pytest.raises(ValueError, match="^host_seq_lens"):
        make_router(Built()).plan([5000], None, host_seq_lens=bad)


def test_lengths_on_the_gpu_are_none_on_the_host(monkeypatch):
    monkeypatch.setattr(router_module.arrays, "view", lambda name, array: SimpleNamespace(device=0))
    with pytest.raises(ValueError, match="^host_seq_lens: expected lengths on the host, got an array on a GPU"):
        make_router(Built()).plan([5000], None, host_seq_lens=object())


def test_the_papers_flashinfer_is_on_tensor_cores(installed):
    build = Built()
    router = make_router(build, policy=PaperPolicy())
    router.plan([8192], None)
    assert set(build) == {"flashinfer_tensor_core"}


def test_a_policy_cannot_choose_what_is_not_there(monkeypatch):
    monkeypatch.setattr(routes.fi, "installed", lambda: False)

    class Stubborn:
        def decide(self, *args, **options):
            return Decision("xqa", None, {}, "because")

    with pytest.raises(ValueError, match="^policy: expected a route among split"):
        make_router(Built(), policy=Stubborn()).plan([5000], None)


def test_a_gpu_that_is_not_calibrated_takes_balanced_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(router_module, "this_device", lambda: None)
    router = make_router(Built(), device=None)
    router.plan([5000], None)
    assert router.counts == {"balanced": 1}
    assert any("gpu.calibrate" in record.message for record in caplog.records)


def test_the_first_choice_of_a_batch_size_is_logged_with_its_reason(caplog):
    caplog.set_level(logging.INFO, logger="gpu.routes.router")
    router = make_router(Built())
    for lens in ([5000], [5100], [5000, 7000], [5050]):
        router.plan(lens, None)
    said = [record.message for record in caplog.records if record.levelno == logging.INFO]
    assert len(said) == 2 and "1 rows" in said[0] and "2 rows" in said[1] and "us" in said[0]


def test_a_device_is_a_name_a_path_or_a_spec(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(H200.to_json())
    assert make_router(Built(), device=path).device.routes == make_router(Built(), device=str(path)).device.routes
    with pytest.raises(ValueError, match="^device: expected a DeviceSpec, a name or a path, got 5"):
        make_router(Built(), device=5)


def test_run_before_plan():
    with pytest.raises(RuntimeError, match="plan"):
        make_router(Built()).run(Run(None, None))


@pytest.mark.parametrize("bad", [[-1], [1.5], [[1]], [2**40]])
def test_bad_lengths(bad):
    with pytest.raises(ValueError, match="seq_lens"):
        make_router(Built()).plan(bad, None)


def test_a_scale_of_ones_own_stays_on_our_routes(installed):
    assert make_router(Built(), scale=0.1).available == OWN_ROUTES


def test_missing_routes_name_their_reason(monkeypatch, installed):
    assert routes.missing_routes(SHAPE) == {}
    assert routes.missing_routes(SHAPE, needs_lse=True) == {"xqa": "it gives no LSE"}
    odd = DecodeShape(28, 4, 128, 24)
    assert "group size 7" in routes.missing_routes(odd)["flashinfer_cuda_core"]
    assert "page size 24" in routes.missing_routes(odd)["xqa"]
    with pytest.raises(ValueError, match="^route: expected"):
        routes.build("nothing", SHAPE)
    monkeypatch.setattr(routes.fi, "installed", lambda: False)
    with pytest.raises(routes.RouteUnavailable, match="not installed"):
        routes.build("xqa", SHAPE)
