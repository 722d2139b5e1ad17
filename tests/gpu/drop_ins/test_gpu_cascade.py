"""FlashInfer's cascade of two levels on the GPU: against float64, captured, and against FlashInfer's own."""
from __future__ import annotations

import importlib.util

import pytest
import torch
from cascade_steps import CascadeStep
from gpu_needs import flashinfer_kernels

from gpu import MultiLevelCascadeAttentionWrapper
from pkvsim import DecodeShape

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
HEADS = {"num_qo_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16}
STEPS = (([(20, 60), (3, 0), (5, 200), (1, 9)], 29), ([(64, 300)], 64), ([(4, 40), (4, 40)], 8))


def workspace() -> torch.Tensor:
    return torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")


def step_of(index: int, *, queries: int = 1) -> CascadeStep:
    groups, rows = STEPS[index]
    own = [(37 * row) % 400 + queries for row in range(rows)]
    return CascadeStep(groups, own, queries=queries, seed=index, shape=SHAPE, device="cuda")


def check(found: torch.Tensor, step: CascadeStep) -> None:
    torch.testing.assert_close(found, step.expected(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_against_float64(layout: str, queries: int) -> None:
    wrapper = MultiLevelCascadeAttentionWrapper(2, workspace(), layout)
    for index in range(len(STEPS)):
        step = step_of(index, queries=queries)
        levels = [[array.cuda() for array in arrays] for arrays in step.levels]
        wrapper.plan(*levels, **HEADS, causal=queries > 1)
        pages = step.k, step.v
        if layout == "NHD":
            pages = tuple(pool.transpose(1, 2).contiguous() for pool in pages)
        for cache in (pages, torch.stack(pages, 1)):
            check(wrapper.run(step.q, cache), step)


def test_a_captured_run_follows_later_plans() -> None:
    rows, pages = 29, 1200
    buffers = [[torch.zeros(size, dtype=torch.int32, device="cuda") for size in sizes]
               for sizes in ((8, rows + 1), (8, rows + 1), (pages, pages), (7, rows))]
    wrapper = MultiLevelCascadeAttentionWrapper(2, workspace(), "HND", True, *buffers)
    own = [[(seed * 91 + 37 * row) % 400 + 1 for row in range(rows)] for seed in range(4)]
    groups = ([(20, 60), (3, 0), (5, 200), (1, 9)], [(29, 0)], [(1, 3)] * 4 + [(25, 100)], [(29, 250)])
    steps = [CascadeStep(*given, seed=seed, shape=SHAPE, device="cuda") for seed, given in enumerate(zip(groups, own))]
    k, v = (torch.zeros(max(len(step.k) for step in steps), 8, 16, 128, dtype=torch.float16, device="cuda")
            for _ in range(2))
    q = torch.zeros(rows, 32, 128, dtype=torch.float16, device="cuda")
    wrapper.plan(*steps[0].levels, **HEADS)
    wrapper.run(q, (k, v))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = wrapper.run(q, (k, v))
    for step in (*steps, *steps[::-1]):
        wrapper.plan(*step.levels, **HEADS)
        q.copy_(step.q), k[:len(step.k)].copy_(step.k), v[:len(step.v)].copy_(step.v)
        graph.replay()
        check(out, step)


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="flashinfer is not installed")
def test_flashinfers_own_gives_the_same() -> None:
    import flashinfer

    step = step_of(0)
    levels = [[array.cuda() for array in arrays] for arrays in step.levels]
    ours, theirs = (make(2, workspace(), "HND") for make in
                    (MultiLevelCascadeAttentionWrapper, flashinfer.MultiLevelCascadeAttentionWrapper))
    with flashinfer_kernels("cascade"):
        theirs.plan(*levels, **HEADS)
        expected = theirs.run(step.q, (step.k, step.v))
    ours.plan(*levels, **HEADS)
    torch.testing.assert_close(ours.run(step.q, (step.k, step.v)), expected, rtol=4e-3, atol=4e-3)
