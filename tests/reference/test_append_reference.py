"""What the append kernel is held to: which tokens go where, and what is stored there."""
from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import POISON_PAGE

from gpu.cache.append_variant import CACHE_TYPES
from pkvsim.reference.append import FP8_DTYPES, append, rotate, token_slots
from pkvsim.reference.rope import ROPE_STYLES, Rope

INV_FREQ = 10000.0 ** (-np.arange(16) / 16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@st.composite
def steps(draw: st.DrawFn) -> dict:
    """Rows that append 0 to 5 tokens each, some empty, in a pool with poisoned entries for what no row owns."""
    page_size = draw(st.sampled_from([1, 3, 16]))
    rows = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5), st.booleans()), min_size=1, max_size=6))
    counts = np.array([new for _, new, _ in rows])
    lens = np.array([0 if empty else old + new for old, new, empty in rows], np.int32)
    pages = -(-lens // page_size)
    num_pages = int(pages.sum()) + draw(st.integers(1, 3))
    ids = iter(draw(st.permutations(range(num_pages))))
    table = np.full((len(rows), int(pages.max()) + 1), POISON_PAGE, np.int32)
    for row, count in enumerate(pages):
        table[row, :count] = [next(ids) for _ in range(count)]
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return {
        "seq_lens": lens,
        "block_table": table,
        "token_offsets": offsets,
        "num_pages": num_pages,
        "page_size": page_size,
        "num_tokens": int(offsets[-1]) + draw(st.integers(0, 2)),
    }


@settings(max_examples=150, deadline=None)
@given(step=steps())
def test_tokens_take_the_last_positions_of_their_rows(step: dict) -> None:
    slots = token_slots(**step)
    lens, table, offsets = step["seq_lens"], step["block_table"], step["token_offsets"]
    found = {
        token: (page, slot, position)
        for token, page, slot, position in zip(
            slots.token.tolist(), slots.page.tolist(), slots.slot.tolist(), slots.position.tolist()
        )
    }
    expected = {}
    for row, length in enumerate(lens):
        new = range(offsets[row], offsets[row + 1])
        for token, position in zip(new, range(length - len(new), length)):
            if length:
                expected[token] = (table[row, position // step["page_size"]], position % step["page_size"], position)
    assert found == expected
    assert len({(page, slot) for page, slot, _ in found.values()}) == len(found), "two tokens in one place"


def test_one_token_per_row_by_default_and_nothing_out_of_reach() -> None:
    table = np.array([[3, 1], [0, POISON_PAGE], [2, -1], [0, 0], [POISON_PAGE, 0]], np.int32)
    lens = np.array([20, 16, 17, 0, 1], np.int32)
    slots = token_slots(lens, table, num_tokens=5, num_pages=4, page_size=16)
    assert slots.token.tolist() == [0, 1] and slots.position.tolist() == [19, 15]
    assert slots.page.tolist() == [1, 0] and slots.slot.tolist() == [3, 15]
    assert token_slots(lens, table, num_tokens=5, num_pages=4, page_size=16, max_positions=19).token.tolist() == [1]
    long = token_slots(np.array([33], np.int32), table[:1], num_tokens=1, num_pages=4, page_size=16)
    assert len(long.token) == 0, "beyond the block table"


@settings(max_examples=60, deadline=None)
@given(
    step=steps(),
    kind=st.sampled_from(["float16", "bfloat16", *CACHE_TYPES]),
    style=st.sampled_from([None, *ROPE_STYLES]),
    nhd=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_append_changes_the_new_tokens_places_and_nothing_else(step, kind, style, nhd, seed) -> None:
    rng = np.random.default_rng(seed)
    tokens = BFLOAT16 if kind == "bfloat16" else np.dtype(np.float16)
    cache = FP8_DTYPES.get(kind, tokens if kind != "int8" else np.dtype(np.int8))
    k_new, v_new, q = (rng.standard_normal((step["num_tokens"], 2, 32)).astype(tokens) for _ in range(3))
    pages = (step["num_pages"], step["page_size"], 2) if nhd else (step["num_pages"], 2, step["page_size"])

    def heads_first(pool: np.ndarray) -> np.ndarray:
        return pool.swapaxes(1, 2) if nhd else pool

    before = rng.integers(0, 100, (2, *pages, 32)).astype(np.int8).astype(cache)
    after, scales = before.copy(), np.full((2, *pages), np.nan, np.float32)
    rope = None if style is None else Rope(style=style, inv_freq=INV_FREQ)
    where = {name: step[name] for name in ("seq_lens", "block_table", "token_offsets")}
    given_scales = {"k_scale": 0.5, "v_scale": 0.25} if kind in FP8_DTYPES else {}
    if kind == "int8":
        given_scales = {"k_token_scales": heads_first(scales[0]), "v_token_scales": heads_first(scales[1])}
    q_out = append(k_new, v_new, heads_first(after[0]), heads_first(after[1]), q=q, rope=rope, **where, **given_scales)
    slots = token_slots(**step)
    written = np.zeros((2, *pages), bool)
    heads_first(written[0])[slots.page, :, slots.slot] = heads_first(written[1])[slots.page, :, slots.slot] = True
    assert (after[~written].view(np.uint8) == before[~written].view(np.uint8)).all()
    step_of = {"float16": 2**-10, "bfloat16": 2**-7, "float8_e4m3fn": 2**-3, "float8_e5m2": 2**-2, "int8": 2**-5}[kind]
    turned = (
        rotate(k_new[slots.token].astype(np.float64), slots.position, rope)
        if rope
        else k_new[slots.token].astype(np.float64)
    )
    for side, expected, scale in ((0, turned, 0.5), (1, v_new[slots.token].astype(np.float64), 0.25)):
        stored = heads_first(after[side])[slots.page, :, slots.slot].astype(np.float64)
        if kind == "int8":
            stored = stored * heads_first(scales[side])[slots.page, :, slots.slot][..., None]
        elif kind in FP8_DTYPES:
            stored = stored * scale
        np.testing.assert_allclose(stored, expected, rtol=step_of, atol=step_of)
    assert np.isnan(scales).all() if kind != "int8" else (np.isnan(scales) == ~written).all()
    passed_over = np.setdiff1d(np.arange(step["num_tokens"]), slots.token)
    assert (q_out[passed_over] == q[passed_over]).all() and q_out.dtype == tokens
