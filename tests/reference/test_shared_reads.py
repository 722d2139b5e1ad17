"""A step whose rows read their common pages together gives what each row gives alone."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_cases import balanced_costs, share_tables, shared_batches

from pkvsim import DecodeShape, make_schedule, reference
from pkvsim.options import AttentionOptions
from pkvsim.schedule.groups import PrefixGroups


@settings(max_examples=60, deadline=None)
@given(shared_batches(max_rows=6, max_pages=6, tiles=(16, 16, 8, 50)), balanced_costs, st.integers(1, 12),
       st.booleans(), st.integers(0, 2**31))  # fmt: skip
def test_every_member_gets_the_attention_of_its_whole_row(batch, costs, cuts, sinks, seed):
    shape, rng = batch.shape, np.random.default_rng(seed)
    table, num_pages = share_tables(batch, seed)
    k, v = rng.standard_normal((2, num_pages, shape.num_kv_heads, shape.page_size, shape.head_dim))
    tokens = () if batch.query_tokens == 1 else (batch.query_tokens,)
    q = rng.standard_normal((len(batch.lens), *tokens, shape.num_q_heads, shape.head_dim))
    options = AttentionOptions(query_tokens=batch.query_tokens, sinks=sinks)
    extra = {"options": options, "sinks": rng.standard_normal(shape.num_q_heads) if sinks else None}
    if batch.query_tokens > 1:
        extra["query_lens"] = np.minimum(rng.integers(0, batch.query_tokens + 1, len(batch.lens)), batch.lens)
    step = (shape, q, k, v, table, batch.lens)
    want = reference.attention(*step, **extra)
    for schedule in (
        make_schedule("balanced", shape, batch.lens, num_ctas=cuts, costs=costs, **batch.options()),
        make_schedule("workqueue", shape, batch.lens, splits=cuts, **batch.options()),
    ):
        for got, expected in zip(reference.run_schedule(schedule, *step, **extra), want):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_rows_that_do_not_share_are_refused():
    shape = DecodeShape(2, 1, 4, 16)
    schedule = make_schedule("balanced", shape, [40, 40], num_ctas=3, groups=PrefixGroups([0, 0], [2]), tile_tokens=16)
    pages = np.zeros((6, 1, 16, 4))
    table = np.array([[0, 1, 2], [0, 4, 5]], np.int32)
    with pytest.raises(ValueError, match=r"block_table\[1, 1\]: expected 1, as in row 0 .* got 4"):
        reference.run_schedule(schedule, shape, np.zeros((2, 2, 4)), pages, pages, table, [40, 40])
