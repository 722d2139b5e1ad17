"""Several engines at once, each on a stream of its own: the results of the serial runs, and no workspace shared."""
from __future__ import annotations

import threading

import cupy
import numpy as np
import pytest
import torch
from decode_ref import Case, check, make_case

from gpu import DecodeEngine
from gpu.drop_ins.torch_decode import decode_attention
from pkvsim import AttentionOptions, DecodeShape

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
STREAMS, STEPS = 6, 20
SCHEDULES = ("balanced", "workqueue", "split")


def cases(seed: int) -> list[Case]:
    """Steps of few long rows, so that every engine passes partial states between CTAs."""
    rng = np.random.default_rng(seed)
    return [make_case(SHAPE, rng.integers(0, 9000, int(rng.integers(1, 6))), seed=100 * seed + i) for i in range(3)]


def outputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full_like(case.q, float("nan")), torch.full(case.q.shape[:2], float("nan"), device="cuda")


def queue_steps(engine: DecodeEngine, work: list[Case]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """STEPS steps on the current stream, none waited for."""
    results = []
    for step in range(STEPS):
        case = work[step % len(work)]
        out, lse = outputs(case)
        engine.plan(case.seq_lens, case.block_table)
        engine.run(case.q, case.k_pages, case.v_pages, out=out, lse=lse)
        results.append((out, lse))
    return results


def serial(engine: DecodeEngine, work: list[Case]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = queue_steps(engine, work)
    torch.cuda.synchronize()
    for case, (out, lse) in zip(work, found):
        check(out, lse, case, dtype="float16")
    return found


def same(found: list, expected: list) -> None:
    for (out, lse), (wanted, wanted_lse) in zip(found, expected, strict=True):
        assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_engines_on_streams_of_their_own_give_the_serial_results(schedule: str) -> None:
    engines = [DecodeEngine(SHAPE, schedule=schedule, splits=8) for _ in range(STREAMS)]
    work = [cases(seed) for seed in range(STREAMS)]
    expected = [serial(engine, own) for engine, own in zip(engines, work)]
    workspaces = {engine.schedule_engine._partials.data.ptr for engine in engines}
    assert len(workspaces) == STREAMS
    streams = [torch.cuda.Stream() for _ in engines]
    torch.cuda.synchronize()
    found = []
    for stream, engine, own in zip(streams, engines, work):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # until all streams have their work
            found.append(queue_steps(engine, own))
    torch.cuda.synchronize()
    for got, wanted in zip(found, expected):
        same(got, wanted)


def test_threads_with_an_engine_each() -> None:
    """Kernels' argument buffers belong to an engine, so two threads launch without a lock between them."""
    work = [cases(seed) for seed in range(4)]
    engines = [DecodeEngine(SHAPE) for _ in work]
    expected = [serial(engine, own) for engine, own in zip(engines, work)]
    found: dict[int, list] = {}
    failed: list[BaseException] = []

    def run(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                found[index] = queue_steps(engines[index], work[index])
                torch.cuda.current_stream().synchronize()
        except BaseException as error:  # a thread's exception is nobody's
            failed.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    for index, wanted in enumerate(expected):
        same(found[index], wanted)


def test_the_operator_has_a_workspace_for_every_stream() -> None:
    work = cases(7)[0]
    expected = [
        part.clone() for part in decode_attention(work.q, work.k_pages, work.v_pages, work.block_table, work.seq_lens)
    ]
    torch.cuda.synchronize()
    found = []
    for stream in [torch.cuda.Stream() for _ in range(STREAMS)]:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)
            found += [
                decode_attention(work.q, work.k_pages, work.v_pages, work.block_table, work.seq_lens)
                for _ in range(STEPS)
            ]
    torch.cuda.synchronize()
    same(found, [expected] * len(found))


def test_one_engine_captured_beside_another_that_runs() -> None:
    """A captured workqueue step keeps its workspace and its task list whatever its engine plans afterwards."""
    small, large = make_case(SHAPE, (700, 90), seed=1), make_case(SHAPE, [6000] * 24, seed=2)
    engine = DecodeEngine(SHAPE, schedule="workqueue", splits=8)
    stream = torch.cuda.Stream()
    out, lse = outputs(small)
    with torch.cuda.stream(stream):
        engine.plan(small.seq_lens, small.block_table)
        engine.run(small.q, small.k_pages, small.v_pages, out=out, lse=lse)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        engine.run(small.q, small.k_pages, small.v_pages, out=out, lse=lse)
    before = engine.schedule_engine._partials
    for _ in range(3):
        engine.plan(large.seq_lens, large.block_table)
        poison = cupy.full(1 << 22, 0xAB, dtype=cupy.uint8)  # where freed memory would be taken up
        found = outputs(large)
        engine.run(large.q, large.k_pages, large.v_pages, out=found[0], lse=found[1])
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        check(out, lse, small, dtype="float16")
        check(*found, large, dtype="float16")
        assert bool((poison == 0xAB).all()), "the graph wrote into memory that was freed"
    assert engine.schedule_engine._partials is not before


def test_options_side_by_side() -> None:
    """Engines of one shape and other options, all at once."""
    work = cases(9)
    engines = [DecodeEngine(SHAPE, options=AttentionOptions(window=window)) for window in (None, 64, 1000)]
    expected = [queue_steps(engine, work) for engine in engines]
    torch.cuda.synchronize()
    found = []
    for engine in engines:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10_000_000)
            found.append(queue_steps(engine, work))
    torch.cuda.synchronize()
    for got, wanted in zip(found, expected):
        same(got, wanted)
