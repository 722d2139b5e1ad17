"""Float64 attention, the schedules run tile by tile, and the merge between them."""
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Case, seq_lens, shapes

from pkvsim import DecodeShape, make_schedule, reference
from pkvsim.schedule.costs import BalancedCosts

SHAPE = DecodeShape(num_q_heads=4, num_kv_heads=2, head_dim=8, page_size=16)


def naive(case):
    """Attention token by token, sharing no code with the reference."""
    shape = case.shape
    out = np.zeros((len(case.lens), shape.num_q_heads, shape.head_dim))
    lse = np.full((len(case.lens), shape.num_q_heads), -np.inf)
    for row, n in enumerate(case.lens):
        for head in range(shape.num_q_heads):
            kv_head = head * shape.num_kv_heads // shape.num_q_heads
            spots = [(case.table[row, t // shape.page_size], kv_head, t % shape.page_size) for t in range(n)]
            if n:
                scores = np.array([case.q[row, head] @ case.k[s] for s in spots]) / np.sqrt(shape.head_dim)
                lse[row, head] = np.logaddexp.reduce(scores)
                out[row, head] = sum(np.exp(s - lse[row, head]) * case.v[at] for s, at in zip(scores, spots))
    return out, lse


def close(got, want):
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(shapes(), seq_lens(max_rows=4, max_tokens=100), st.integers(0, 2**31))
def test_attention_equals_the_definition(shape, lens, seed):
    case = Case(shape, lens, seed)
    out, lse = reference.attention(*case.args())
    assert out.dtype == lse.dtype == np.float64
    close((out, lse), naive(case))


@settings(max_examples=60, deadline=None)
@given(st.data(), shapes(), seq_lens(), st.integers(0, 2**31), st.sampled_from([8, 32, 50]))
def test_every_schedule_equals_attention(data, shape, lens, seed, tile_tokens):
    case = Case(shape, lens, seed)
    want = reference.attention(*case.args())
    options = {
        "split": {"splits": data.draw(st.integers(1, 9))},
        "workqueue": {"splits": data.draw(st.lists(st.integers(1, 9), min_size=len(lens), max_size=len(lens)))},
        "balanced": {
            "num_ctas": data.draw(st.integers(1, 30)), "costs": BalancedCosts(segment=data.draw(st.integers(0, 3)))
        },
    }
    for name, chosen in options.items():
        schedule = make_schedule(name, shape, lens, tile_tokens=tile_tokens, **chosen)
        close(reference.run_schedule(schedule, *case.args()), want)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.lists(st.integers(0, 80), max_size=6), st.integers(0, 2**31))
def test_merging_is_independent_of_the_split(tokens, cuts, seed):
    rng = np.random.default_rng(seed)
    scores, v = rng.standard_normal((3, tokens)) * 20, rng.standard_normal((tokens, 5))
    edges = [0, *sorted(min(c, tokens) for c in cuts), tokens]
    m = np.full((len(edges) - 1, 3), -np.inf)
    l, acc = np.zeros_like(m), np.zeros((*m.shape, 5))
    for i, (a, b) in enumerate(zip(edges, edges[1:])):
        if a < b:  # equal edges leave the empty state
            m[i] = scores[:, a:b].max(axis=1)
            weights = np.exp(scores[:, a:b] - m[i][:, None])
            l[i], acc[i] = weights.sum(axis=1), weights @ v[a:b]
    lse = np.logaddexp.reduce(scores, axis=1)
    close(reference.merge_states(m, l, acc), (np.exp(scores - lse[:, None]) @ v, lse))


def test_merging_nothing_gives_zeros_and_minus_infinity():
    out, lse = reference.merge_states(np.full((2, 1), -np.inf), np.zeros((2, 1)), np.zeros((2, 1, 4)))
    assert (out == 0).all() and np.isneginf(lse).all()


def test_zero_rows_and_half_precision():
    case = Case(SHAPE, [0, 33, 0], 1, np.float16)
    for out, lse in (
        reference.attention(*case.args()),
        reference.run_schedule(make_schedule("workqueue", SHAPE, case.lens, splits=2), *case.args()),
    ):
        assert (out[[0, 2]] == 0).all() and np.isneginf(lse[[0, 2]]).all()
        assert np.isfinite(out).all() and np.isfinite(lse[1]).all() and out.dtype == np.float64


def test_scale():
    case = Case(SHAPE, [5], 2)
    _, lse = reference.attention(*case.args(), scale=0.0)
    np.testing.assert_allclose(lse, np.log(5))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (1, np.zeros((1, 4, 9)), r"q: expected floats \[1, 4, 8\], got float64 \[1, 4, 9\]"),
        (1, np.zeros((1, 4, 8), np.int32), r"q: expected floats \[1, 4, 8\], got int32"),
        (3, np.zeros((1, 2, 16, 8)), r"v_pages: expected floats \[5, 2, 16, 8\], got float64 \[1, "),
        (4, np.zeros((1, 1), np.int32), r"block_table: expected int32 \[1, >=2\]"),
        (4, np.full((1, 2), 5, np.int32), r"block_table\[0, 0\]: expected a page id in \[0, 5\), got 5"),
        (5, [-1], r"seq_lens\[0\]: expected a length"),
    ],
)
def test_bad_arguments(index, value, message):
    args = list(Case(SHAPE, [20], 3).args())
    args[index] = value
    with pytest.raises(ValueError, match=message):
        reference.attention(*args)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "0.5", True])
def test_a_scale_that_is_none(scale):
    with pytest.raises(ValueError, match="^scale: expected a finite number"):
        reference.attention(*Case(SHAPE, [20], 3).args(), scale=scale)


def test_query_lens_are_integers():
    with pytest.raises(ValueError, match="^query_lens: expected counts"):
        reference.attention(*Case(SHAPE, [20], 3).args(), query_lens=[0.5])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_any_float_type_and_whatever_becomes_an_array(dtype):
    shape, q, k, v, table, lens = Case(SHAPE, [20], 3).args()
    stored = [array.astype(dtype) for array in (q, k, v)]
    want = reference.attention(shape, *(array.astype(np.float64) for array in stored), table, lens)
    close(reference.attention(shape, *stored, table, lens), want)
    lists = [array.astype(np.float64).tolist() for array in stored]
    close(reference.attention(shape, *lists, table.tolist(), list(lens)), want)
    close(reference.run_schedule(make_schedule("balanced", shape, lens, num_ctas=3), shape, *lists, table, lens), want)


def test_a_schedule_of_another_batch_is_refused():
    with pytest.raises(ValueError, match="schedule: expected one of 1 rows, got 2"):
        reference.run_schedule(make_schedule("split", SHAPE, [4, 4], splits=1), *Case(SHAPE, [20], 3).args())
