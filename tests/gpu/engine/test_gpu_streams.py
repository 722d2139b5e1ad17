"""Where the plan's arrays lie and which stream runs are on must not matter to the result."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from decode_ref import check, make_case, run_poisoned

from gpu import DecodeEngine
from pkvsim import DecodeShape
from pkvsim.schedule.costs import BalancedCosts

SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)
SCHEDULES = ("split", "workqueue", "balanced")


def _within_wider(table: torch.Tensor) -> torch.Tensor:
    """The same values as a view whose rows, where there are rows of several, lie further apart."""
    return torch.cat([table, table], -1)[..., :table.shape[-1]] if table.dim() == 2 else table


PLACES = {"numpy": lambda t: t.cpu().numpy(), "numpy in a wider one": lambda t: _within_wider(t.cpu()).numpy(),
          "host in a wider one": lambda t: _within_wider(t.cpu()), "GPU in a wider one": _within_wider,
          "torch on the host": lambda t: t.cpu(), "torch on the GPU": lambda t: t,
          "mixed": None}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("place", PLACES)
def test_plans_from_anywhere_again_and_again(schedule: str, place: str) -> None:
    engine = DecodeEngine(SHAPE, schedule=schedule)
    for seed in range(4):  # the second plan of a layout takes the short way
        case = make_case(SHAPE, np.random.default_rng(seed).permutation([5, 900, 0, 77]), seed=seed)
        if place == "mixed":
            engine.plan(case.seq_lens.cpu(), case.block_table)
        else:
            engine.plan(PLACES[place](case.seq_lens), PLACES[place](case.block_table))
        check(*run_poisoned(engine, case), case, dtype="float16")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_side_stream(schedule: str) -> None:
    """Steps queued on a side stream behind long work, each planned while the ones before it have not run."""
    stream = torch.cuda.Stream()
    cases = [make_case(SHAPE, np.random.default_rng(seed).integers(0, 3000, 6), seed=seed) for seed in range(12)]
    torch.cuda.synchronize()
    engine = DecodeEngine(SHAPE, schedule=schedule)
    results = []
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for case in cases:
            engine.plan(case.seq_lens.cpu().numpy() if schedule == "balanced" else case.seq_lens, case.block_table)
            results.append(engine.run(case.q, case.k_pages, case.v_pages))
    torch.cuda.synchronize()
    for case, (out, lse) in zip(cases, results):
        check(out, lse, case, dtype="float16")


@pytest.mark.parametrize(
    "bad",
    [{"num_ctas": 0}, {"num_ctas": -1}, {"costs": BalancedCosts(segment=-1)}, {"costs": BalancedCosts(minimum=0)}],
)
def test_bad_costs(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        DecodeEngine(SHAPE, **bad)


@pytest.mark.parametrize("lens", [[2**40, 1], [-1, 1], [1.5, 1]])
def test_bad_list_of_lengths(lens: list) -> None:
    with pytest.raises(ValueError, match="seq_lens"):
        DecodeEngine(SHAPE).plan(lens, np.zeros((2, 4), np.int32))
