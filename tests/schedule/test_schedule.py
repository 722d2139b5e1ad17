"""Every tile in exactly one task, whatever the schedule; and the cuts of the balanced one."""
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seq_lens, shapes

from pkvsim import DecodeShape, make_schedule
from pkvsim.schedule.costs import BalancedCosts, paired
from pkvsim.schedule.make import SHORT_RANGE_TILES

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
TASK_FIELDS = ("row", "kv_head", "split", "tile_begin", "tile_end")


def assert_covers(schedule, shape, lens):
    """Each tile of each (row, KV head) once, pieces numbered from 0 in tile order, queue in order."""
    tiles = [-(-n // schedule.tile_tokens) for n in lens]
    ends, pieces = {}, {}
    order = []
    for row, kv_head, split, begin, end in schedule.tasks.tolist():
        key = (row, kv_head)
        assert begin == ends.get(key, 0) and begin < end <= tiles[row]
        assert split == pieces.get(key, 0)
        assert split < schedule.split_offsets[row + 1] - schedule.split_offsets[row] <= tiles[row]
        ends[key], pieces[key] = end, split + 1
        order.append((row, kv_head, split))
    assert order == sorted(order)
    heads = {(r, h): n for r, n in enumerate(tiles) if n for h in range(shape.num_kv_heads)}
    assert ends == heads
    assert schedule.tasks.dtype.names == TASK_FIELDS and schedule.split_offsets[0] == 0
    assert schedule.cta_offsets[0] == 0 and schedule.cta_offsets[-1] == len(schedule.tasks)
    assert len(schedule.cta_offsets) == schedule.num_ctas + 1 and (np.diff(schedule.cta_offsets) >= 0).all()


@settings(max_examples=150, deadline=None)
@given(st.data(), shapes(), seq_lens(max_tokens=5000), st.sampled_from([1, 16, 32, 100]))
def test_queues_cover_every_tile_once(data, shape, lens, tile_tokens):
    counts = st.integers(1, 60)
    splits = data.draw(st.one_of(counts, st.lists(counts, min_size=len(lens), max_size=len(lens))))
    asked = np.broadcast_to(splits, len(lens))
    want = [min(int(s), -(-n // tile_tokens)) for s, n in zip(asked, lens)]
    for name in ("split", "workqueue"):
        schedule = make_schedule(name, shape, lens, splits=splits, tile_tokens=tile_tokens)
        assert_covers(schedule, shape, lens)
        assert np.diff(schedule.split_offsets).tolist() == want
        assert schedule.num_partial_slots == sum(want)
        assert schedule.num_partial_tasks == len(schedule.tasks) == sum(want) * shape.num_kv_heads
        launches = {(n, w) for n, w in zip(lens, want) if n}
        if name == "split":
            assert schedule.merge_launches == sum(w > 1 for _, w in launches)
            assert schedule.num_launches == len(launches) + schedule.merge_launches
        for row, _, split, begin, end in schedule.tasks.tolist():
            tiles = -(-lens[row] // tile_tokens)
            assert (begin, end) == (tiles * split // want[row], tiles * (split + 1) // want[row])


def test_launches():
    lens = [4096, 4096, 96, 0, 20]
    split = make_schedule("split", SHAPE, lens, splits=8)  # 20 tokens are one tile: no merge
    assert (split.num_launches, split.merge_launches) == (5, 2)
    assert split.grid_ctas == 4 * 8 * 8 and split.num_ctas == 8 * (8 + 8 + 3 + 1)
    queue = make_schedule("workqueue", SHAPE, lens, splits=8)
    assert (queue.num_launches, queue.merge_launches, queue.grid_ctas) == (2, 1, queue.num_ctas)
    balanced = make_schedule("balanced", SHAPE, lens, num_ctas=28)
    assert (balanced.num_launches, balanced.merge_launches, balanced.num_ctas) == (1, 0, 28)


def range_costs(schedule, segment_cost):
    """Cost of each range when every head's tile 0 carries the segment cost."""
    tasks = schedule.tasks
    cost = tasks["tile_end"] - tasks["tile_begin"] + segment_cost * (tasks["tile_begin"] == 0)
    sums = np.concatenate(([0], np.cumsum(cost)))
    return np.diff(sums[schedule.cta_offsets])


@settings(max_examples=300, deadline=None)
@given(
    shapes(), seq_lens(max_rows=12, max_tokens=4000), st.integers(1, 140), st.integers(0, 6), st.integers(1, 9)
)  # fmt: skip
def test_balanced(shape, lens, num_ctas, segment_cost, min_cost):
    schedule = make_schedule(
        "balanced", shape, lens, num_ctas=num_ctas, costs=BalancedCosts(segment_cost, min_cost)
    )
    assert_covers(schedule, shape, lens)
    tiles = [-(-n // 32) for n in lens]
    weights = [shape.num_kv_heads * (n + segment_cost) if n else 0 for n in tiles]
    total, ranges = sum(weights), schedule.num_ctas
    most = max(1, min(total // max(min_cost, 1 + segment_cost), num_ctas))
    heads = shape.num_kv_heads * sum(map(bool, tiles))
    capped = most < num_ctas  # by the cost, so that CTAs idle whatever the cut
    assert (1 if capped else most - most // 8) <= ranges <= most
    if ranges < most:  # given up so that heads of equal length are cut alike
        assert len(set(filter(None, tiles))) == 1 and total // most < SHORT_RANGE_TILES
        if heads <= most:
            assert ranges % heads == 0 and ranges + heads > most
        else:
            assert ranges == -(-heads // -(-heads // most)) and (capped or (most - ranges) * 32 <= most)
    if total == 0:
        assert len(schedule.tasks) == 0 and schedule.cta_offsets.tolist() == [0, 0]
        return
    costs = range_costs(schedule, segment_cost)
    even = len(set(filter(None, tiles))) == 1 and total // most < SHORT_RANGE_TILES
    alike = even and heads <= ranges and ranges % heads == 0
    assert alike or not (even and capped and 0 < heads <= most)
    if alike:  # parts of equal tiles
        sizes = schedule.tasks["tile_end"] - schedule.tasks["tile_begin"]
        assert len(schedule.tasks) == ranges and sizes.max() - sizes.min() <= 1
        return
    assert costs.sum() == total and (np.diff(schedule.cta_offsets) > 0).all()
    assert (np.abs(costs - total / ranges) <= 1 + segment_cost).all()
    if segment_cost == 0:
        assert costs.max() - costs.min() <= 1
    cuts = [i * total // ranges for i in range(ranges + 1)]
    for i in range(ranges):
        tasks = schedule.tasks[schedule.cta_offsets[i] : schedule.cta_offsets[i + 1]].tolist()
        partial = 0
        for row, kv_head, split, begin, end in tasks:
            start = sum(weights[:row]) + kv_head * (tiles[row] + segment_cost)
            assert split == i - ((start + 1) * ranges - 1) // total
            first = start if begin == 0 else start + segment_cost + begin
            assert cuts[i] <= first and (start + segment_cost + end - 1 if end > 1 else start) < cuts[i + 1]
            partial += (begin, end) != (0, tiles[row])
        assert partial <= 2


@given(st.integers(1, 60000), st.integers(1, 16), st.integers(1, 400), st.integers(1, 12))
def test_parts_that_pay(tiles, num_kv_heads, num_ctas, part_cost):
    """Parts of a head are near the least of tiles / p + part_cost * p, as far as there are CTAs."""
    shape = DecodeShape(num_kv_heads, num_kv_heads, 64, 16)
    costs = BalancedCosts(part=part_cost)
    schedule = make_schedule("balanced", shape, [tiles * 16], num_ctas=num_ctas, tile_tokens=16, costs=costs)
    parts = schedule.num_ctas / num_kv_heads
    best = max(1.0, math.sqrt(tiles / part_cost))
    assert parts <= max(1, 1.5 * best + 1)
    if num_ctas >= num_kv_heads * (2 * best + 2) and tiles > best:
        assert parts >= 0.5 * best
        assert tiles / parts + part_cost * parts <= 1.15 * (tiles / best + part_cost * best) + part_cost


@given(st.integers(1, 40), st.integers(1, 4000), st.integers(1, 16), st.integers(2, 300), st.integers(0, 300),
       st.integers(0, 12), st.booleans())
def test_short_steps_take_half_the_ctas(rows, tiles, num_kv_heads, num_ctas, pair_cost, segment_cost, longer):
    """Exactly where rows are alike, cost less than pair_cost a CTA, and their heads divide half the CTAs but for at
    most 1/6. Then always in equal parts or whole heads, of as many CTAs as that and the cost allow."""
    shape = DecodeShape(num_kv_heads, num_kv_heads, 64, 16)
    lens = [tiles * 16] * rows
    if longer and rows > 1:
        lens[0] += 16
    plan = dict(num_ctas=num_ctas, tile_tokens=16)
    schedule, whole = (make_schedule("balanced", shape, lens, **plan, costs=BalancedCosts(segment_cost, pair=cost))
        for cost in (pair_cost, 0))
    assert_covers(schedule, shape, lens)
    heads, half = rows * num_kv_heads, num_ctas // 2
    cost = num_kv_heads * sum(length // 16 + segment_cost for length in lens)
    if len(set(lens)) > 1 or cost >= pair_cost * num_ctas or heads > half or half % heads > half / 6:
        assert schedule.tasks.tolist() == whole.tasks.tolist()
        return
    allowed = min(half, cost // (1 + segment_cost))
    parts = np.bincount(schedule.tasks["row"] * num_kv_heads + schedule.tasks["kv_head"], minlength=heads)
    assert (parts == parts[0]).all() and schedule.num_ctas == allowed // heads * heads == parts[0] * heads
    sizes = schedule.tasks["tile_end"] - schedule.tasks["tile_begin"]
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("rows, num_kv_heads, num_ctas", [(7, 8, 56), (7, 4, 56), (7, 2, 56), (11, 5, 55), (5, 8, None),
                                                          (54, 1, None)])
def test_heads_that_leave_too_many_of_half_the_ctas_idle_take_all(rows, num_kv_heads, num_ctas):
    """Of half the 132 CTAs, 10 or 11 may idle; where more would (None), all are taken."""
    shape, lens = DecodeShape(num_kv_heads, num_kv_heads, 64, 16), [1024] * rows
    costs = BalancedCosts(7, 8, 2, 80)
    schedule, whole = (make_schedule("balanced", shape, lens, num_ctas=132, tile_tokens=16, costs=c)
                       for c in (costs, costs._replace(pair=0)))
    if num_ctas is None:
        assert schedule.tasks.tolist() == whole.tasks.tolist()
    else:
        assert schedule.num_ctas == num_ctas and len(set(schedule.tasks["tile_end"] - schedule.tasks["tile_begin"])) <= 2


@pytest.mark.parametrize("columns, wanted", [(4, 7), (31, 7), (32, 20), (64, 20)])
def test_segments_of_many_columns_cost_more(columns, wanted):
    kernel = dict(columns=columns, v_head_dim=128, kv_element_bytes=2, page_size=16)
    assert BalancedCosts(segment=7).of_kernel(**kernel).segment == wanted
    assert BalancedCosts(segment=30).of_kernel(**kernel).segment == 30


@pytest.mark.parametrize("columns, v_head_dim, element_bytes, wanted", [
    (4, 128, 2, 80), (16, 128, 2, 80), (17, 128, 2, 40), (32, 64, 2, 80), (16, 256, 2, 40), (4, 128, 1, 0)])
def test_pairs_by_what_an_sm_computes(columns, v_head_dim, element_bytes, wanted):
    assert paired(80, columns, v_head_dim, element_bytes, 16) == wanted
    assert paired(80, columns, v_head_dim, element_bytes, 1) == 0


def test_equal_rows_are_not_cut():
    """More heads than CTAs: each takes as many whole ones, 128 of 132 CTAs four each."""
    shape = DecodeShape(32, 8, 128, 16)
    costs = BalancedCosts(segment=7)
    schedule = make_schedule("balanced", shape, [1024] * 64, num_ctas=132, tile_tokens=16, costs=costs)
    assert schedule.num_ctas == 128 and schedule.num_partial_tasks == 0
    ragged = make_schedule("balanced", DecodeShape(32, 8, 128, 16), [1024] * 63 + [900], num_ctas=132, tile_tokens=16)
    assert ragged.num_ctas == 132


def test_balanced_ranges_hold_whole_positions():
    """The cut arithmetic by hand: 2 heads of 5 tiles, 4 ranges of 2 or 3 tiles."""
    shape = DecodeShape(2, 2, 64, 16)
    schedule = make_schedule("balanced", shape, [160], num_ctas=4)
    assert schedule.tasks.tolist() == [(0, 0, 0, 0, 2), (0, 0, 1, 2, 5), (0, 1, 0, 0, 2), (0, 1, 1, 2, 5)]
    assert schedule.num_partial_tasks == 4 and schedule.num_partial_slots == 2
    whole = make_schedule("balanced", shape, [160], num_ctas=2)
    assert whole.num_partial_tasks == whole.num_partial_slots == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("queue", {"splits": 1}, "name: expected one of split, workqueue, balanced, got 'queue'"),
        ("split", {}, "splits: expected an integer in .* got None"),
        ("split", {"splits": 0}, "splits: expected an integer in .* got 0"),
        ("workqueue", {"splits": [1, 2]}, r"splits: expected an integer or integers \[1\], got int64 \[2\]"),
        ("workqueue", {"splits": [0]}, "splits: expected counts >= 1, got 0"),
        ("workqueue", {"splits": [1.0]}, r"splits: .* got float64 \[1\]"),
        ("workqueue", {"splits": 4, "num_ctas": 3}, "num_ctas: expected None for workqueue"),
        ("workqueue", {"splits": 4, "tile_tokens": 0}, "tile_tokens: expected an integer"),
        ("workqueue", {"splits": 2**31 - 1, "tile_tokens": 1}, "splits: expected at most"),
        ("balanced", {}, "num_ctas: expected an integer in .* got None"),
        ("balanced", {"num_ctas": 4, "splits": 4}, "splits: expected None for balanced"),
        ("balanced", {"num_ctas": 4, "costs": BalancedCosts(segment=-1)}, "costs.segment: expected"),
        ("balanced", {"num_ctas": 4, "costs": BalancedCosts(minimum=0)}, "costs.minimum: expected"),
    ],
)
def test_bad_arguments(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(name, SHAPE, [2**31 - 1], **options)


def test_what_is_no_shape_is_named():
    with pytest.raises(ValueError, match=r"^shape: expected a DecodeShape, got \(4, 2, 64, 16\)"):
        make_schedule("balanced", (4, 2, 64, 16), [100], num_ctas=4)


@pytest.mark.parametrize("window", [2**31, 2**70])
def test_a_window_longer_than_any_row_hides_nothing(window):
    plain, wide = (make_schedule("balanced", SHAPE, [100, 7], num_ctas=4, window=w) for w in (None, window))
    assert (plain.tasks == wide.tasks).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [("workqueue", {"splits": 20}), ("split", {"splits": 20}), ("balanced", {"num_ctas": 132})],
)
def test_planning_256_long_rows_takes_under_a_millisecond(name, options):
    lens = np.full(256, 131072, np.int32)
    make_schedule(name, SHAPE, lens, **options)
    times_s = []
    for _ in range(50):
        begin = time.perf_counter()
        make_schedule(name, SHAPE, lens, **options)
        times_s.append(time.perf_counter() - begin)
    assert min(times_s) < 1e-3  # the least: other work on the machine only ever adds
