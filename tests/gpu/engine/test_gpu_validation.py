"""Every bad input is a ValueError that names the argument, before any launch."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from decode_ref import Case, make_case

from gpu import DecodeEngine
from pkvsim import DecodeShape

SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)
SCHEDULES = ("split", "workqueue", "balanced")

BAD_PLANS = {
    "seq_lens float": ("seq_lens", lambda lens, table: (lens.astype(np.float32), table)),
    "seq_lens 2-d": ("seq_lens", lambda lens, table: (lens[None], table)),
    "seq_lens negative": ("seq_lens", lambda lens, table: (np.array([-1, *lens[1:]], np.int32), table)),
    "seq_lens past the table": ("block_table", lambda lens, table: (lens + np.int32(10**6), table)),
    "block_table 1-d": ("block_table", lambda lens, table: (lens, table[0])),
    "block_table rows": ("block_table", lambda lens, table: (lens, table[:1])),
    "block_table float": ("block_table", lambda lens, table: (lens, table.astype(np.float32))),
}
BAD_RUNS = {
    "q dtype": ("q", lambda a: a | {"q": a["q"].float()}),
    "q heads": ("q", lambda a: a | {"q": a["q"][:, :4].contiguous()}),
    "q batch": ("q", lambda a: a | {"q": a["q"][:1]}),
    "q on the host": ("q", lambda a: a | {"q": a["q"].cpu()}),
    "k_pages dtype": ("k_pages", lambda a: a | {"k_pages": a["k_pages"].float()}),
    "k_pages rank": ("k_pages", lambda a: a | {"k_pages": a["k_pages"][0]}),
    "k_pages page not contiguous": ("k_pages", lambda a: a | {
        "k_pages": a["k_pages"].transpose(2, 3).contiguous().transpose(2, 3)}),
    "k_pages on the host": ("k_pages", lambda a: a | {"k_pages": a["k_pages"].cpu()}),
    "v_pages count": ("v_pages", lambda a: a | {"v_pages": a["v_pages"][:-1]}),
    "v_pages head_dim": ("v_pages", lambda a: a | {"v_pages": a["v_pages"][..., :64].contiguous()}),
    "out shape": ("out", lambda a: a | {"out": a["out"][:1]}),
    "out dtype": ("out", lambda a: a | {"out": a["out"].float()}),
    "lse dtype": ("lse", lambda a: a | {"lse": a["lse"].half()}),
}


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(SHAPE, (100, 33))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", BAD_PLANS)
def test_bad_plan(case: Case, schedule: str, name: str) -> None:
    argument, spoil = BAD_PLANS[name]
    engine = DecodeEngine(SHAPE, schedule=schedule)
    with pytest.raises(ValueError, match=argument):
        engine.plan(*spoil(case.seq_lens.cpu().numpy(), case.block_table.cpu().numpy()))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_run(case: Case, schedule: str, name: str) -> None:
    argument, spoil = BAD_RUNS[name]
    engine = DecodeEngine(SHAPE, schedule=schedule)
    engine.plan(case.seq_lens, case.block_table)
    good = {"q": case.q, "k_pages": case.k_pages, "v_pages": case.v_pages,
            "out": torch.full_like(case.q, 7.0), "lse": torch.full(case.q.shape[:2], 7.0, device="cuda")}
    bad = spoil(good)
    with pytest.raises(ValueError, match=rf"^{argument}\b"):
        engine.run(bad["q"], bad["k_pages"], bad["v_pages"], out=bad["out"], lse=bad["lse"])
    torch.cuda.synchronize()
    assert bool((good["out"] == 7.0).all()) and bool((good["lse"] == 7.0).all()), "nothing may be launched"


def test_run_before_plan(case: Case) -> None:
    with pytest.raises(RuntimeError, match="plan"):
        DecodeEngine(SHAPE).run(case.q, case.k_pages, case.v_pages)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("page", (-1, 10**6))
def test_page_id_out_of_range(case: Case, schedule: str, page: int) -> None:
    engine = DecodeEngine(SHAPE, schedule=schedule)
    table = case.block_table.cpu().numpy()
    engine.plan(case.seq_lens, table, validate=True)
    engine.run(case.q, case.k_pages, case.v_pages)  # poison past a row's last page is no error
    table[1, 2] = page
    engine.plan(case.seq_lens, table, validate=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="^block_table"):
            engine.run(case.q, case.k_pages, case.v_pages)


@pytest.mark.parametrize("field", ("dtype", "schedule"))
def test_bad_engine(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        DecodeEngine(SHAPE, dtype="float32") if field == "dtype" else DecodeEngine(SHAPE, schedule="nothing")
