"""cuda_src itself, built for the CPU, over K and V that lie side by side in one array, whose axes lie in any order."""
from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from decode_on_cpu import Step, aligned, make_step, run
from test_decode_kernel import assert_close, expected

from pkvsim import AttentionOptions, DecodeShape
from pkvsim.schedule.groups import PrefixGroups

# As vLLM 0.33 names them: axes of layers, blocks, KV heads, tokens and content as they lie in memory.
ORDERS = ("LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC", "LHBNC")
SHAPE = DecodeShape(8, 2, 64, 16)
LENS = (90, 83, 80, 131, 97, 96, 85)
GROUPS = PrefixGroups((0,) * 7, (5,))


def side_by_side(step: Step, order: str, num_layers: int = 3) -> Step:
    """The step over views of the middle one of several layers, [pages, heads, tokens, 2 * head_dim] each; the others'
    values are NaN."""
    pages, heads, tokens, dim = step.k.shape
    sizes = {"L": num_layers, "B": pages, "H": heads, "N": tokens, "C": 2 * dim}
    lies = aligned(np.full([sizes[axis] for axis in order], np.nan, step.k.dtype))
    layer = lies.transpose([order.index(axis) for axis in "LBHNC"])[num_layers // 2]
    layer[..., :dim], layer[..., dim:] = step.k, step.v
    return dataclasses.replace(step, k=layer[..., :dim], v=layer[..., dim:])


WARPGROUPS = {"variant": (4, 2), "read_stages": 4}
CASES = [*((order, None, {}) for order in ORDERS), *(pytest.param(order, GROUPS, ways, marks=pytest.mark.slow)
         for order, ways in (("LBNHC", {}), ("BLHNC", {}), *((order, WARPGROUPS) for order in ORDERS)))]  # fmt: skip


@functools.cache
def step_and_apart(shared: bool) -> tuple[Step, tuple[np.ndarray, np.ndarray]]:
    """(a step over K and V in arrays of their own, what it gives)."""
    step = make_step(SHAPE, "float16", AttentionOptions(), seed=7, lens=LENS, groups=GROUPS if shared else None)
    apart = run(step, "balanced", ctas=9)
    assert_close(apart, expected(step), "float16")
    return step, apart


@pytest.mark.parametrize(("order", "groups", "ways"), CASES)
def test_decode_reads_them_where_they_lie(order, groups, ways) -> None:
    step, apart = step_and_apart(groups is not None)
    beside = run(side_by_side(step, order), "balanced", ctas=9, **ways)
    if ways:
        assert_close(beside, expected(step), "float16")
    else:
        for got, wanted in zip(beside, apart):
            np.testing.assert_array_equal(got, wanted)
