"""Kernels whose warps share tiles in teams, built for the CPU, against float64 attention."""
from __future__ import annotations

import numpy as np
import pytest
from decode_on_cpu import make_step, run
from test_decode_kernel import MAX_ERROR

from gpu.kernels.variant import kernel_config
from pkvsim import AttentionOptions, DecodeShape, reference

MAX_LSE_ERROR = {"float16": 1e-3, "bfloat16": 4e-3}  # the sum is of weights as rounded
TOKENS = {"kv_dtype": "int8", "kv_scales": "token"}
# (splits, team); group, query tokens, (head_dim, V's), page size; dtype, schedule, (warps, stages of each), stages of a
# ring where other; options.
CASES = [
    ((1, 2), 32, 1, (128, 128), 16, "float16", "balanced", (4, 2), None, {}),
    ((1, 2), 4, 8, (128, 128), 3, "bfloat16", "workqueue", (4, 1), None, {"window": 40, "sinks": True}),
    ((1, 2), 5, 5, (128, 128), 64, "float16", "balanced", (4, 2), 3, {"soft_cap": 4.0}),
    ((1, 4), 8, 8, (128, 128), 64, "float16", "balanced", (8, 1), 2, {"window": 40}),
    ((2, 4), 16, 8, (128, 128), 1, "bfloat16", "workqueue", (4, 1), 1, TOKENS),
    ((1, 2), 4, 8, (128, 128), 16, "float16", "balanced", (4, 1), 1, TOKENS | {"window": 20, "sinks": True}),
    ((1, 4), 32, 1, (256, 256), 3, "bfloat16", "balanced", (4, 1), 2, TOKENS),
    ((1, 4), 16, 2, (64, 192), 16, "float16", "workqueue", (4, 1), None, {"kv_dtype": "float8_e4m3fn"}),
    ((1, 4), 9, 4, (64, 128), 1, "float16", "balanced", (4, 1), 3, {"soft_cap": 4.0, "sinks": True}),
    ((2, 2), 16, 8, (64, 64), 16, "bfloat16", "balanced", (2, 2), None, {}),
]


def test_cases_cover_what_they_claim() -> None:
    assert {case[0] for case in CASES} == {(1, 2), (1, 4), (2, 2), (2, 4)}
    assert {case[4] for case in CASES} == {1, 3, 16, 64}
    for team in (2, 4):
        own = [case for case in CASES if case[0][1] == team]
        assert {case[5] for case in own} == set(MAX_ERROR) and {case[6] for case in own} == {"balanced", "workqueue"}
        assert {case[9].get("kv_scales") for case in own} >= {None, "token"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:9])))
def test_a_team_attends_to_every_token_once(case) -> None:
    (splits, team), group, tokens, (head_dim, v_dim), page_size, dtype, schedule, variant, stages, more = case
    options = AttentionOptions(query_tokens=tokens, v_head_dim=v_dim, **more)
    shape = DecodeShape(2 * group, 2, head_dim, page_size)
    config = kernel_config(shape, dtype, 90, variant=variant, options=options)
    assert (config.head_split, config.team) == (splits, team)
    step = make_step(shape, dtype, options, seed=group, lens=(0, 9, 16, 33, 120), ragged=tokens > 1)
    sinks = None if step.sinks is None else step.sinks.astype(np.float64)
    want, want_lse = reference.attention(shape, step.q.astype(np.float64), *step.values(), step.table, step.lens,
                                         sinks=sinks, query_lens=step.query_lens, options=options)
    served = np.ones(want_lse.shape, bool)
    if step.query_lens is not None:
        served &= (np.arange(tokens) < step.query_lens[:, None])[..., None] | (step.lens == 0)[:, None, None]
    for hurry in (False, True):
        out, lse = run(step, schedule, variant=variant, stages=stages, hurry=hurry)
        assert np.isnan(out[~served]).all() and np.isnan(lse[~served]).all()  # left as they were
        assert np.abs(out - want)[served].max() <= MAX_ERROR[dtype] * max(1.0, np.abs(want).max())
        finite = np.isfinite(want_lse) & served
        np.testing.assert_allclose(lse[finite], want_lse[finite], atol=MAX_LSE_ERROR[dtype])
        assert (lse[~finite & served] == -np.inf).all() and (out[~finite & served] == 0).all()
