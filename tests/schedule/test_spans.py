"""Schedules with shared reads against a plain statement of pkvsim.schedule.spans, tile by tile."""
import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shared_cases import balanced_costs, shared_batches
from strategies import seq_lens, shapes

from pkvsim import DecodeShape, make_schedule
from pkvsim.schedule.balanced import balanced_ranges
from pkvsim.schedule.costs import MAX_SHARED_COST, MEASURED_COSTS, MOST_READ_COST, SharedCosts, columns_for
from pkvsim.schedule.fill import fill_balanced, fill_spans
from pkvsim.schedule.groups import PrefixGroups

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)


def expected_reads(batch):
    """[(shared tiles, members, columns that it costs as, eighths a tile)] and each row's shared tiles, stated row by row."""
    reads, shared_of_row = [], [0] * len(batch.lens)
    most = batch.shared_costs.columns // batch.columns
    for group, pages in enumerate(batch.groups.prefix_pages.tolist()):
        tokens = pages * batch.shape.page_size
        tiles = tokens // batch.tile_tokens
        rows = [row for row, own in enumerate(batch.groups.group_of_row)
                if own == group and tiles >= 1 and tokens <= batch.lens[row] - batch.query_tokens + 1]  # fmt: skip
        if len(rows) < 2:
            continue
        parts = -(-len(rows) // most)
        columns = -(-len(rows) // parts) * batch.columns
        eighths = max(batch.shared_costs.least, -(-columns * batch.shared_costs.tile // 64))
        cuts = [len(rows) * part // parts for part in range(parts + 1)]
        reads += [(tiles, rows[a:b], columns, eighths) for a, b in itertools.pairwise(cuts)]
        for row in rows:
            shared_of_row[row] = tiles
    return reads, shared_of_row


def read_segment(columns, costs, shared):
    return max(1, costs.segment, -(-columns * shared.segment // 8))


def least_own(batch, costs):
    """Tiles that a member's own span costs at least: the root of what merging an output takes times the reads' tiles for
    each output."""
    reads, _ = expected_reads(batch)
    whole = sum(read_segment(columns, costs, batch.shared_costs) - (-tiles * eighths // 8)
                for tiles, _, columns, eighths in reads)  # fmt: skip
    members = sum(len(rows) for _, rows, *_ in reads)  # as many heads as reads have cancel out
    return max(1, math.isqrt(batch.shared_costs.merge * (whole // members))) if members else 1


def spans_of(batch, costs):
    """Every span in order: (read or -1, row, kv_head, first tile, tiles, segment cost, eighths)."""
    reads, shared_of_row = expected_reads(batch)
    heads, shared = range(batch.shape.num_kv_heads), batch.shared_costs
    for index, (tiles, rows, columns, eighths) in enumerate(reads):
        segment = read_segment(columns, costs, shared)
        yield from ((index, rows[0], head, 0, tiles, segment, eighths) for head in heads)
    least = least_own(batch, costs)
    for row, length in enumerate(batch.lens):
        first = shared_of_row[row]
        tiles = -(-length // batch.tile_tokens) - first
        if length:
            segment = costs.segment + (max(0, least - max(1, tiles)) if first else 0)
            yield from ((-1, row, head, first, tiles, segment, 8) for head in heads)


def expected_tasks(batch, costs, num_ctas):
    """Tasks of the balanced schedule, each tile put where its position lies: [(read, row, head, part, begin, end)] of
    every range, and the total cost."""
    spans = list(spans_of(batch, costs))
    total = sum(segment - (-max(1, tiles) * eighths // 8) for *_, tiles, segment, eighths in spans)
    most = batch.shared_costs.columns // batch.columns * batch.columns
    read = read_segment(most, costs, batch.shared_costs) - (
        -max(batch.shared_costs.least, -(-most * batch.shared_costs.tile // 64)) // 8)  # fmt: skip
    gap = max(costs.segment + least_own(batch, costs), read)
    least = costs._replace(minimum=max(costs.minimum, gap))
    count, _ = balanced_ranges(total, len(spans), num_ctas, least, False)
    cuts = [i * total // count for i in range(1, count + 1)]
    ranges = [[] for _ in range(count)]
    start = 0
    for index, row, head, first, tiles, segment, eighths in spans:
        positions = [start + (segment + t * eighths // 8 if t else 0) for t in range(max(1, tiles))]
        homes = [sum(cut <= position for cut in cuts) for position in positions]
        for part, (home, these) in enumerate(itertools.groupby(range(len(homes)), homes.__getitem__)):
            these = list(these)
            ranges[home].append((index, row, head, part, first + these[0], first + min(tiles, these[-1] + 1)))
        start += segment - (-max(1, tiles) * eighths // 8)
    return ranges, total, gap


@settings(max_examples=200, deadline=None)
@given(shared_batches(tiles=(16, 16, 8, 50)), balanced_costs, st.integers(1, 40))
def test_balanced_equals_its_statement(batch, costs, num_ctas):
    schedule = make_schedule("balanced", batch.shape, batch.lens, num_ctas=num_ctas, costs=costs, **batch.options())
    reads, shared_of_row = expected_reads(batch)
    if not reads:
        plain = make_schedule(
            "balanced", batch.shape, batch.lens, num_ctas=num_ctas, costs=costs, tile_tokens=batch.tile_tokens
        )
        assert schedule.shared is None and schedule.tasks.tolist() == plain.tasks.tolist()
        assert schedule.cta_offsets.tolist() == plain.cta_offsets.tolist()
        return
    found = schedule.shared
    made = [(int(read["tiles"]), found.members_of(i).tolist()) for i, read in enumerate(found.reads)]
    assert made == [read[:2] for read in reads]
    assert found.members_of_tasks().tolist() == [len(reads[i][1]) if i >= 0 else 1 for i in found.read_of_task.tolist()]
    ranges, total, gap = expected_tasks(batch, costs, num_ctas)
    assert [[(read, *task) for read, task in zip(found.read_of_task[a:b].tolist(), schedule.tasks[a:b].tolist())]
            for a, b in itertools.pairwise(schedule.cta_offsets.tolist())] == ranges  # fmt: skip
    assert all(ranges)  # a range that were empty would leave nothing in its slot

    # What the slots and the waits of the specification rest on.
    spans = {(read, row, head): first + tiles for read, row, head, first, tiles, *_ in spans_of(batch, costs)}
    merging, states = {}, {}
    for index, tasks in enumerate(ranges):
        assert all(spans[task[:3]] == task[5] for task in tasks[:-1])  # only the last piece may be cut at its end
        for read, row, head, part, _begin, end in tasks:
            if read < 0 and spans[read, row, head] == end:
                assert merging.setdefault((row, head), index) == index
            for member in [row] if read < 0 else reads[read][1]:
                states.setdefault((member, head), []).append((index, read >= 0, part))
    for head_of_row, parts in states.items():
        assert parts == sorted(parts, key=lambda part: (part[0], not part[1], part[2]))
        assert max(part[0] for part in parts) == merging[head_of_row]
        own = sum(not part[1] for part in parts)
        row = head_of_row[0]
        slots = schedule.split_offsets[row + 1] - schedule.split_offsets[row] - found.shared_parts()[row]
        assert own <= slots and len(parts) - own <= found.shared_parts()[row]
    partial = sum(len(parts) for (row, _), parts in states.items() if len(parts) > 1 or shared_of_row[row])
    assert schedule.num_partial_tasks == partial


beside_squares = st.builds(lambda root, beside: root**2 + beside, st.integers(1, 1500), st.integers(-1, 1))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, MAX_SHARED_COST), st.one_of(st.integers(0, 2 * MOST_READ_COST), beside_squares), st.integers(1, 99))
@example(1, 1024**2 - 1, 1)
@example(MAX_SHARED_COST, MOST_READ_COST - 1, 1)
@example(MAX_SHARED_COST, MOST_READ_COST, 1)
def test_the_root_is_exact(merge, reads_cost, outputs):
    """Also where a square is one more than what the root is of, so that the price can share it with the plan."""
    exact = max(1, math.isqrt(merge * min(reads_cost, MOST_READ_COST)))
    assert SharedCosts(merge=merge).least_own(reads_cost * outputs + outputs - 1, outputs) == exact


@settings(max_examples=100, deadline=None)
@given(shared_batches(), balanced_costs, st.integers(1, 40))
def test_ranges_cost_alike(batch, costs, num_ctas):
    ranges, total, gap = expected_tasks(batch, costs, num_ctas)
    cost_of = {span[:3]: span[3:] for span in spans_of(batch, costs)}
    for tasks in ranges:
        cost = 0
        for read, row, head, part, begin, end in tasks:
            first, tiles, segment, eighths = cost_of[read, row, head]
            start = 0 if part == 0 else segment + (begin - first) * eighths // 8
            whole = segment - (-max(1, tiles) * eighths // 8)  # a span costs whole tiles, its last one rounded up
            cost += (whole if end == first + tiles else segment + (end - first) * eighths // 8) - start
        assert abs(cost - total / len(ranges)) <= gap + 1


@settings(max_examples=100, deadline=None)
@given(shared_batches(tiles=(16, 50)), st.integers(1, 9))
def test_queue_reads_every_tile_once(batch, splits):
    schedule = make_schedule("workqueue", batch.shape, batch.lens, splits=splits, **batch.options())
    reads, shared_of_row = expected_reads(batch)
    if not reads:
        assert schedule.shared is None
        return
    ends, parts = {}, {}
    for read, (row, head, split, begin, end) in zip(schedule.shared.read_of_task.tolist(), schedule.tasks.tolist()):
        key = read, row, head
        assert begin == ends.get(key, 0 if read >= 0 else shared_of_row[row]) and begin < end
        assert split == parts.get(key, 0)
        ends[key], parts[key] = end, split + 1
    tiles = [-(-length // batch.tile_tokens) for length in batch.lens]
    heads = range(batch.shape.num_kv_heads)
    wanted = {(i, rows[0], head): count for i, (count, rows, *_) in enumerate(reads) for head in heads}
    own = {row: count for row, count in enumerate(tiles) if count > shared_of_row[row]}
    wanted |= {(-1, row, head): count for row, count in own.items() for head in heads}
    assert ends == wanted
    own = [parts.get((-1, row, 0), 0) for row in range(len(tiles))]
    shared = schedule.shared.shared_parts()
    assert np.diff(schedule.split_offsets).tolist() == (own + shared).tolist()
    assert all(parts[i, rows[0], 0] == shared[row] for i, (_, rows, *_) in enumerate(reads) for row in rows)


@settings(max_examples=100, deadline=None)
@given(shapes(), seq_lens(max_rows=12, max_tokens=4000), st.integers(1, 140), balanced_costs)
def test_plain_entries_are_cut_as_rows_are(shape, lens, num_ctas, costs):
    tiles = np.array([-(-n // 16) for n in lens], np.int64)
    heads, used = shape.num_kv_heads, int(np.count_nonzero(tiles))
    total = heads * (int(tiles.sum()) + used * costs.segment)
    count, _ = balanced_ranges(total, heads * used, num_ctas, costs, False)
    made = []
    for fill in (fill_balanced, fill_spans):
        tasks, offsets = np.zeros((heads * used + count, 5), np.int32), np.zeros(count + 1, np.int32)
        parts = np.zeros(len(tiles), np.int64)
        if fill is fill_balanced:
            done, _ = fill(tiles, heads, costs.segment, total, count, 0, tasks, offsets, parts)
        else:
            spans, ones = heads * (tiles > 0).astype(np.int64), np.ones(len(tiles), np.int64)
            done = fill(tiles, spans, costs.segment * ones, 8 * ones, total, count, tasks, offsets, parts)
        made.append((tasks[:done].tolist(), offsets.tolist(), parts.tolist()))
    assert made[0] == made[1]


def test_a_read_is_read_once_and_its_rows_pay_what_is_theirs():
    """64 rows of 8K + 512 tokens: four reads of 16 rows, 512 tiles each, instead of 64 times those."""
    lens = [8704] * 64
    groups = PrefixGroups(np.zeros(64, np.int32), [512])
    options = {"num_ctas": 132, "costs": MEASURED_COSTS, "tile_tokens": 16}
    shared = make_schedule("balanced", SHAPE, lens, groups=groups, **options)
    plain = make_schedule("balanced", SHAPE, lens, **options)
    tiles = [int((s.tasks["tile_end"] - s.tasks["tile_begin"]).sum()) for s in (shared, plain)]
    assert tiles == [8 * (4 * 512 + 64 * 32), 8 * 64 * 544]
    assert shared.num_launches == 1 and shared.num_ctas == 132
    assert len(shared.shared.reads) == 4 and (shared.shared.read_of_row == np.arange(64) // 16).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("split", {"splits": 2}, "groups: expected None for split"),
        ("balanced", {"num_ctas": 4, "window": 64}, "window: expected None with groups"),
        ("balanced", {"num_ctas": 4, "shared_costs": SharedCosts(7)}, "shared_costs.columns: expected two rows' 8 or more"),
        ("balanced", {"num_ctas": 4, "shared_costs": MEASURED_COSTS}, "shared_costs: expected SharedCosts"),
        ("balanced", {"num_ctas": 4, "shared_costs": SharedCosts(tile=-1)}, "shared_costs.tile: expected"),
        ("balanced", {"num_ctas": 4, "shared_costs": SharedCosts(least=0)}, "shared_costs.least: expected"),
        ("balanced", {"num_ctas": 4, "query_tokens": 0}, "query_tokens: expected an integer"),
        ("balanced", {"num_ctas": 4, "splits": 4}, "splits: expected None for balanced"),
        ("workqueue", {"splits": 4, "num_ctas": 4}, "num_ctas: expected None for workqueue"),
        ("balanced", {"num_ctas": 4, "groups": PrefixGroups([0], [1])}, r"groups: expected group_of_row \[2\], got"),
        ("balanced", {"num_ctas": 4, "groups": ([0, 0], [2])}, r"groups: expected .*PrefixGroups or None, got tuple"),
    ],
)  # fmt: skip
def test_bad_arguments(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(name, SHAPE, [64, 64], **{"groups": PrefixGroups([0, 0], [2]), **options})


@pytest.mark.parametrize(
    ("rows", "pages", "message"),
    [
        ([0, 2], [1, 1], r"group_of_row\[1\]: expected a value in \[-1, 1\], got 2"),
        ([0], [-1], r"prefix_pages\[0\]: expected a value in \[0, "),
        ([0.5], [1], r"group_of_row: expected integers \[batch_size\], got float64"),
        ([0], [[1]], r"prefix_pages: expected integers \[num_groups\], got int64 \[1, 1\]"),
    ],
)
def test_bad_groups(rows, pages, message):
    with pytest.raises(ValueError, match=message):
        PrefixGroups(rows, pages)


def test_groups_against_their_block_table():
    table = np.array([[5, 6, 1], [5, 6, 2], [5, 7, 3]], np.int32)
    PrefixGroups([0, 0, -1], [2]).check(table, [40, 33, 40], page_size=16)
    with pytest.raises(ValueError, match=r"prefix_pages\[0\]: expected at most the 1 full pages of row 1, got 2"):
        PrefixGroups([0, 0, -1], [2]).check(table, [40, 31, 40], page_size=16)
    with pytest.raises(ValueError, match=r"group_of_row\[2\]: expected the page ids of row 0 .* 7 for 6 in column 1"):
        PrefixGroups([0, 0, 0], [2]).check(table, [40, 40, 40], page_size=16)
    with pytest.raises(ValueError, match=r"groups: expected group_of_row \[1\], got \[3\]"):
        PrefixGroups([0, 0, 0], [2]).check(table, [40], page_size=16)
    PrefixGroups([0, 0, -1], [2]).check(table.tolist(), [40, 33, 40], page_size=16)
    with pytest.raises(ValueError, match=r"block_table: expected integers \[3, max_pages\], got"):
        PrefixGroups([0, 0, -1], [2]).check(table[0], [40, 33, 40], page_size=16)


@given(st.one_of(st.integers(1, 80), st.integers(1, 2**20)))
def test_reads_are_made_for_as_few_columns_as_hold_a_step_s(batch_columns):
    assert columns_for(batch_columns) == min((some for some in (32, 64) if batch_columns <= some), default=64)
