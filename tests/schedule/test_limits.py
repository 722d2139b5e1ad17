"""Where the balanced schedule changes its mind: each rule at its limit, and one tile or CTA beyond."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seq_lens, shapes

from pkvsim import make_schedule
from pkvsim.schedule.balanced import balanced_ranges
from pkvsim.schedule.costs import BalancedCosts


@pytest.mark.parametrize(("total_cost", "heads", "num_ctas", "costs", "wanted"), [
    (80 * 132 - 1, 8, 132, {"pair": 80}, (64, 8)), (80 * 132, 8, 132, {"pair": 80}, (128, 16)),  # half of the CTAs
    (640 * 9 - 1, 8, 9, {}, (8, 1)), (640 * 9, 8, 9, {}, (9, 0)),  # short ranges
    (6300, 63, 72, {}, (63, 1)), (6200, 62, 71, {}, (71, 0)),  # one of eight CTAs idles, or more
    (12400, 124, 64, {}, (62, 0)), (12200, 122, 63, {}, (63, 0)),  # one of 32 idles, or more
])  # fmt: skip
def test_equal_rows_at_each_limit(total_cost, heads, num_ctas, costs, wanted):
    assert balanced_ranges(total_cost, heads, num_ctas, BalancedCosts(**costs), True) == wanted


@pytest.mark.parametrize(("head_cost", "wanted"), [(9, 2), (10, 3), (13, 3), (14, 3)])
def test_parts_are_rounded_to_the_nearest(head_cost, wanted):
    """Parts of isqrt(2 * head_cost) tiles, which are 4 for 9 to 12 and 5 from 13 on."""
    assert balanced_ranges(head_cost, 1, 99, BalancedCosts(part=2), False) == (wanted, 0)


@given(shapes(), seq_lens(max_rows=6, max_tokens=400), st.integers(1, 450), st.sampled_from([1, 7, 16]),
       st.sampled_from([("balanced", {"num_ctas": 13}), ("workqueue", {"splits": 3}), ("split", {"splits": 3})]))
def test_a_window_reads_the_tiles_that_hold_its_tokens(shape, lens, window, tile_tokens, way):
    name, options = way
    schedule = make_schedule(name, shape, lens, window=window, tile_tokens=tile_tokens, **options)
    read = {}
    for row, head, _, begin, end in schedule.tasks.tolist():
        read.setdefault((row, head), []).extend(range(begin, end))
    assert read == {
        (row, head): sorted({token // tile_tokens for token in range(max(0, length - window), length)})
        for row, length in enumerate(lens) if length for head in range(shape.num_kv_heads)
    }  # fmt: skip
