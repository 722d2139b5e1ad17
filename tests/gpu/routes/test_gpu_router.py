"""The router against float64 on every route, array library and place; what it takes in graphs and for empty rows."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import test_gpu_options
import torch
from decode_ref import UNUSED_ENTRY, Case, attention, check, make_case

from gpu import DecodeEngine
from gpu.inputs.block_tables import StepTables
from gpu.inputs.run import Run, StepPlanner
from gpu.kernels.this_gpu import this_gpu
from gpu.measure.timing import capture, shared_stream
from gpu.routes import flashinfer_route, router
from gpu.routes import route_engines as routes
from pkvsim import AttentionOptions, DecodeShape
from pkvsim.devices.device import get_device
from pkvsim.devices.route_model import OWN_ROUTES, ROUTES
from pkvsim.policy.by_name import CalibratedPolicy, FixedPolicy

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
H200 = get_device("h200")  # whose prices any GPU may be routed by in a test
LENGTHS = (9000, 3, 700, 65, 1024)


@pytest.fixture(scope="module")
def case() -> Case:
    return clean(make_case(SHAPE, LENGTHS, seed=1))


def clean(case: Case) -> Case:
    """Without poison in pages and table: FlashInfer's kernels read past a row's end."""
    for pool in (case.k_pages, case.v_pages):
        pool.nan_to_num_()
    return replace(case, block_table=torch.where(case.block_table == UNUSED_ENTRY, 0, case.block_table))


def engine_of(route: str) -> StepPlanner:
    if route not in routes.available_routes(SHAPE):
        pytest.skip(f"{route}: {routes.missing_routes(SHAPE)[route]}")
    try:
        return routes.build(route, SHAPE)
    except routes.RouteUnavailable as error:
        pytest.skip(str(error))


def agrees(case: Case, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    torch.cuda.synchronize()
    if lse is not None:
        check(out, lse, case, dtype="float16")
        return
    expected, _ = attention(case)
    assert float((out.double() - expected).abs().max()) < 2e-3


@pytest.mark.parametrize("lengths_on", ("host", "both"))
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_through_the_router(case: Case, route: str, lengths_on: str) -> None:
    built = engine_of(route)
    needs_lse = route != "xqa"
    chosen = router.Router(
        SHAPE, policy=FixedPolicy(route), device=H200, needs_lse=needs_lse, build=lambda *args, **options: built
    )
    lens = case.seq_lens.cpu().numpy()
    for validate in (False, True):
        if lengths_on == "host":
            chosen.plan(lens, case.block_table, validate=validate)
        else:
            chosen.plan(case.seq_lens, case.block_table, host_seq_lens=lens, validate=validate)
        out = torch.full_like(case.q, float("nan"))
        found = chosen.run(Run(case.q, case.k_pages, case.v_pages, out))
        assert chosen.decision.route == route and found[0] is out and (found[1] is not None) == (route != "xqa")
        agrees(case, *found)


@pytest.mark.parametrize("options", [
    AttentionOptions(window=333), AttentionOptions(soft_cap=5.0), AttentionOptions(sinks=True),
    AttentionOptions(query_tokens=4), AttentionOptions(window=100, sinks=True)], ids=repr)
@pytest.mark.parametrize("route", ROUTES)
def test_routes_serve_the_options_that_they_say_they_serve(route: str, options: AttentionOptions) -> None:
    shape = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)
    chosen = router.Router(shape, policy=FixedPolicy(route), device=H200, needs_lse=False, options=options)
    if route not in chosen.available:
        pytest.skip(f"{route}: {routes.missing_routes(shape, options=options)[route]}")
    q, k, v, table, lens = test_gpu_options.step(shape, options, "float16")
    for pool in (k, v):
        pool.nan_to_num_()
    table = torch.where(table == UNUSED_ENTRY, 0, table)
    arrays = q[1:].contiguous(), k, v, table[1:].contiguous(), lens[1:].contiguous()  # row 0 is empty
    sinks = torch.randn(8, device="cuda") if options.sinks else None
    more = {"sinks": sinks.double().cpu().numpy()} if options.sinks else {}
    wanted = test_gpu_options.expected(shape, options, arrays, **more)
    try:
        chosen.plan(arrays[4].cpu().numpy(), arrays[3])
    except ValueError as error:  # what could not be built is left out, which this policy cannot follow
        pytest.skip(str(error))
    out, _ = chosen.run(Run(*arrays[:3], sinks=sinks))
    torch.cuda.synchronize()
    assert np.abs(out.double().cpu().numpy() - wanted[0]).max() < 4e-3


@pytest.mark.parametrize("route", ROUTES)
def test_cupy_arrays_and_a_combined_cache(route: str) -> None:
    cupy = pytest.importorskip("cupy")
    made = clean(make_case(SHAPE, LENGTHS, seed=2, combined=True))
    both = made.k_pages._base  # [num_pages, 2, num_kv_heads, page_size, head_dim]
    engine = engine_of(route)
    torch.cuda.synchronize()
    q, pages = cupy.from_dlpack(made.q), cupy.from_dlpack(both)
    out, lse = cupy.zeros_like(q), None if route == "xqa" else cupy.zeros(q.shape[:2], cupy.float32)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        engine.plan(StepTables(np.asarray(LENGTHS, np.int32), cupy.from_dlpack(made.block_table)))
        engine.run(Run(q, pages, out=out, lse=lse))
        stream.synchronize()
    torch.cuda.synchronize()
    agrees(made, torch.from_dlpack(out), None if lse is None else torch.from_dlpack(lse))


def test_auto_takes_the_policys_route(case: Case) -> None:
    engine = DecodeEngine(SHAPE, schedule="auto", device=H200)
    lens = case.seq_lens.cpu().numpy()
    engine.plan(case.seq_lens, case.block_table, host_seq_lens=lens)
    agrees(case, *engine.run(case.q, case.k_pages, case.v_pages))
    expected = CalibratedPolicy().decide(SHAPE, lens, H200, available=engine.router.available)
    assert engine.router.decision.route == expected.route
    engine.plan(case.seq_lens, case.block_table)
    assert engine.router.decision.route == "balanced" and "GPU" in engine.router.decision.reason
    agrees(case, *engine.run(case.q, case.k_pages, case.v_pages))


def test_auto_refuses_what_its_routes_need_not_serve(case: Case) -> None:
    engine = DecodeEngine(SHAPE, schedule="auto", device=H200)
    engine.plan(case.seq_lens, case.block_table)
    for name, given in (("scale", 0.5), ("sinks", torch.zeros(SHAPE.num_q_heads, device="cuda"))):
        with pytest.raises(ValueError, match=f"^{name}"):
            engine.run(case.q, case.k_pages, case.v_pages, **{name: given})
    agrees(case, *engine.run(case.q, case.k_pages, case.v_pages))


def test_cupys_null_stream_is_not_torchs_current_one() -> None:
    cupy = pytest.importorskip("cupy")
    with torch.cuda.stream(torch.cuda.Stream()):
        with cupy.cuda.Stream.null, flashinfer_route._torch_on_stream("cupy", 0) as stream:
            assert stream.cuda_stream == 0 and torch.cuda.current_stream().cuda_stream == 0
        assert torch.cuda.current_stream().cuda_stream != 0


def test_auto_keeps_empty_rows_on_our_routes() -> None:
    """With poison everywhere else, which our routes never read."""
    made = make_case(SHAPE, (0, 5000, 0, 17, 900))
    engine = DecodeEngine(SHAPE, schedule="auto", device=H200)
    for layers in (1, 80):
        engine.router.layers = layers
        engine.plan(made.seq_lens.cpu().numpy(), made.block_table)
        assert engine.router.decision.route in OWN_ROUTES
        agrees(made, *engine.run(made.q, made.k_pages, made.v_pages))


def test_auto_inside_a_captured_graph_follows_the_lengths(case: Case) -> None:
    engine = DecodeEngine(SHAPE, schedule="auto", device=H200)
    lens, out = case.seq_lens.clone(), torch.empty_like(case.q)
    lse = torch.empty(case.q.shape[:2], dtype=torch.float32, device="cuda")

    def step() -> None:
        engine.plan(lens, case.block_table)
        engine.run(case.q, case.k_pages, case.v_pages, out=out, lse=lse)

    with shared_stream():
        step()
        graph = capture(step)
        for scale in (1.0, 0.5, 0.0):
            lens.copy_((case.seq_lens * scale).int())
            out.fill_(float("nan"))
            graph.replay()
            agrees(replace(case, seq_lens=lens.clone()), out, lse)


def test_splits_change_between_plans(case: Case) -> None:
    lens = case.seq_lens.cpu().numpy()
    for route in ("split", "workqueue"):
        engine = routes.build(route, SHAPE)
        for splits in (1, 7, np.array([16, 1, 3, 2, 5], np.int64)):
            engine.plan(StepTables(lens, case.block_table), splits=splits)
            agrees(case, *engine.run(Run(case.q, case.k_pages, case.v_pages)))


def test_bad_arguments_are_named_on_flashinfers_routes_too(case: Case) -> None:
    engine = engine_of("flashinfer_tensor_core")
    lens = case.seq_lens.cpu().numpy()
    with pytest.raises(ValueError, match="^seq_lens"):
        engine.plan(StepTables(lens + np.int32(10**6), case.block_table))
    table = case.block_table.cpu().numpy()
    table[0, 0] = 10**6
    engine.plan(StepTables(lens, table), validate=True)
    with pytest.raises(ValueError, match="^block_table"):
        engine.run(Run(case.q, case.k_pages, case.v_pages))
    engine.plan(StepTables(lens, case.block_table))
    with pytest.raises(ValueError, match="^q"):
        engine.run(Run(case.q.float(), case.k_pages, case.v_pages))


def test_a_gpu_of_the_catalogue_is_found_by_name() -> None:
    found, gpu = router.this_device(), this_gpu()
    capability = divmod(gpu.compute_capability, 10)
    assert found is None or (found.num_sms, found.compute_capability) == (gpu.num_sms, capability)
    if gpu.name in ("NVIDIA H200", get_device("rtx3060").label):
        assert found is not None and found.routes
    DecodeEngine(SHAPE, schedule="auto")  # on any GPU, with or without a calibration
