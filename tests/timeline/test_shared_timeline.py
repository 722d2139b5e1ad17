"""Steps whose rows read together, simulated: the timeline's laws, and against the loop of plain steps."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_cases import shared_batches

from pkvsim import AttentionOptions, DecodeShape
from pkvsim.devices.device import get_device
from pkvsim.pricing.constants import read_speeds
from pkvsim.pricing.counters import distinct_kv_bytes
from pkvsim.pricing.shared import REREAD_L2_SHARE, REREAD_SPEEDUP, read_prices
from pkvsim.pricing.shared_us import read_tokens
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.schedule.prefixes import sharing_rule
from pkvsim.timeline.range_loop import RangeTasks, run_ranges
from pkvsim.timeline.shared import run_shared, shared_schedule, shared_tasks, simulate_shared
from pkvsim.timeline.timeline import simulate

H200 = get_device("h200")
MODEL = H200.routes["balanced"]
SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)


@settings(max_examples=25, deadline=None)
@given(lens=st.lists(st.integers(0, 20000), min_size=1, max_size=20), num_sms=st.integers(1, 140))
def test_ranges_at_one_speed_run_as_plain_steps_do(lens, num_sms):
    line = simulate(MODEL, SHAPE, lens, num_sms=num_sms)
    count = len(line.bytes)
    if not count:
        return
    start, end = np.zeros((2, count))
    tasks = RangeTasks(line.schedule.cta_offsets, np.full(count, MODEL.segment_us), line.bytes,
                       np.full(count, line.cta_gb_s * 1e3))
    fixed = float(line.start_us.min())
    parts = run_ranges(tasks, np.zeros(count, bool), line.shared_gb_s * 1e3, 1.0, fixed, start, end)
    np.testing.assert_allclose(end, line.end_us, rtol=1e-9)
    np.testing.assert_allclose(start, line.start_us, rtol=1e-9)
    assert parts[1] == 0.0 and sum(parts) <= end.max() - fixed + 1e-9


@settings(max_examples=25, deadline=None)
@given(data=st.data(), ctas=st.integers(1, 12), shared=st.floats(1, 50), share=st.floats(0.05, 1))
def test_speeds_of_their_own_and_never_more_than_there_is(data, ctas, shared, share):
    counts = data.draw(st.lists(st.integers(0, 4), min_size=ctas, max_size=ctas))
    count = sum(counts)
    floats = [data.draw(st.lists(st.floats(low, high), min_size=count, max_size=count))
              for low, high in ((0, 3), (0, 40), (0.5, 9))]
    fixed, sizes, speeds = (np.array(numbers, float) for numbers in floats)
    start, end = np.zeros((2, count))
    offsets = np.cumsum([0, *counts]).astype(np.int32)
    of_read = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), bool)
    parts = run_ranges(RangeTasks(offsets, fixed, sizes, speeds), of_read, shared, share, 1.0, start, end)
    assert (end - start >= (fixed + sizes / speeds) * (1 - 1e-9) - 1e-9).all()
    for begin, stop in zip(offsets, offsets[1:]):
        if begin < stop:
            assert start[begin] == 1.0 and (start[begin + 1:stop] == end[begin:stop - 1]).all()
    if count:
        took = end.max() - 1.0
        assert sizes.sum() <= shared * took * (1 + 1e-9) + 1e-9
        longest = max(float((fixed + sizes / speeds)[a:b].sum()) for a, b in zip(offsets, offsets[1:]))
        assert longest - 1e-9 <= took <= longest + sizes.sum() / shared + 1e-9  # nobody waits while there is bandwidth
        assert sum(parts) <= took + 1e-9


def test_a_read_gets_its_share_of_a_bandwidth_that_is_used_up_and_all_that_others_leave():
    start, end = np.zeros((2, 2))
    tasks = RangeTasks(np.array([0, 1, 2], np.int32), np.zeros(2), np.array([10.0, 10.0]), np.array([9.0, 9.0]))
    parts = run_ranges(tasks, np.array([True, False]), 4.0, 1 / 3, 0.0, start, end)
    # One and three of four bytes a us until the row's ten are read, then all four.
    assert end.tolist() == pytest.approx([10 / 3 + (10 - 10 / 3) / 4, 10 / 3])
    assert parts == pytest.approx((5.0, 0.0, 0.0))
    # A row that keeps up with less than its share leaves the rest.
    slow = tasks._replace(speeds=np.array([9.0, 1.0]))
    run_ranges(slow, np.array([True, False]), 4.0, 1 / 3, 0.0, start, end)
    assert end.tolist() == pytest.approx([10 / 3, 10.0])


@settings(max_examples=25, deadline=None)
@given(batch=shared_batches(max_rows=12, max_pages=60))
def test_steps_with_reads(batch):
    shape = DecodeShape(batch.shape.num_q_heads, batch.shape.num_kv_heads, 128, batch.shape.page_size)
    lens, options = np.array(batch.lens, np.int32), AttentionOptions(query_tokens=batch.query_tokens)
    step = simulate_shared(MODEL, shape, lens, batch.groups, H200, options=options)
    schedule = shared_schedule(MODEL, shape, lens, batch.groups, H200, options=options)
    assert (step is None) == (schedule.shared is None)
    if step is None:
        return
    line = step.timeline
    assert (line.schedule.tasks == schedule.tasks).all() and line.num_slots == H200.num_sms
    assert sum(getattr(step.split, name) for name in step.split.__slots__) == pytest.approx(line.makespan_us)
    assert min(getattr(step.split, name) for name in step.split.__slots__) >= -1e-9
    assert line.makespan_us >= line.end_us.max() and (line.end_us >= line.start_us).all()
    # All distinct bytes are read, and what several reads of one group read again.
    members = batch.groups.members(lens, page_size=shape.page_size, tile_tokens=16, query_tokens=batch.query_tokens)
    told = PrefixGroups(members.astype(np.int32), batch.groups.prefix_pages)
    tiles = PrefixGroups(told.group_of_row, told.prefix_pages * shape.page_size // 16)  # only whole tiles are shared
    distinct = distinct_kv_bytes(DecodeShape(shape.num_q_heads, shape.num_kv_heads, 128, 16), lens, tiles, options)
    assert line.bytes.sum() >= distinct - 1e-6
    assert step.closed_us <= 1.5 * line.makespan_us and line.makespan_us <= 1.5 * step.closed_us


def test_the_closed_form_is_near_the_timeline():
    """In steps that save enough to be read together: others are not."""
    rng, apart = np.random.default_rng(5), []
    while len(apart) < 40:
        groups, each, heads = (int(rng.choice(some)) for some in ((1, 2, 4), (2, 4, 8, 16, 40), (0, 1, 2)))
        shape = (SHAPE, DecodeShape(28, 4, 128, 16), DecodeShape(32, 32, 128, 16))[heads]
        prefixes = rng.integers(32, 1500, groups).astype(np.int32)
        of_row = np.repeat(np.arange(groups), each).astype(np.int32)
        lens = (prefixes[of_row] * 16 + rng.integers(1, 2000, len(of_row))).astype(np.int32)
        if not sharing_rule(shape, bandwidth_gb_per_s=4000).worth(int((each - 1) * prefixes.sum() * 16)):
            continue
        step = simulate_shared(MODEL, shape, lens, PrefixGroups(of_row, prefixes), H200)
        apart.append(abs(step.closed_us / step.timeline.makespan_us - 1))
    assert np.mean(apart) < 0.05 and max(apart) < 0.15, (np.mean(apart), max(apart))


def test_reading_together_beats_reading_apart_where_much_is_shared():
    lens, groups = np.full(64, 8704, np.int32), PrefixGroups(np.zeros(64, np.int32), [512])
    shared = simulate_shared(MODEL, SHAPE, lens, groups, H200)
    assert 2 * shared.timeline.makespan_us < simulate(MODEL, SHAPE, lens, num_sms=132).makespan_us
    alone = PrefixGroups(np.arange(64, dtype=np.int32), [512] * 64)
    assert simulate_shared(MODEL, SHAPE, lens, alone, H200) is None


@settings(max_examples=60, deadline=None)
@given(batch=shared_batches(max_rows=12, max_pages=60), l2_mib=st.sampled_from([0.01, 0.3, 50.0]))
def test_what_reads_find_in_l2_and_what_merges_wait_for(batch, l2_mib):
    """Task by task: what another read of its group has read is in L2 where it fits, and an output is merged behind its
    CTA's last task, once its read's parts and the other parts of its own tiles have ended."""
    shape = DecodeShape(batch.shape.num_q_heads, batch.shape.num_kv_heads, 128, batch.shape.page_size)
    device, heads = replace(H200, l2_mib=l2_mib), shape.num_kv_heads
    lens, options = np.array(batch.lens, np.int32), AttentionOptions(query_tokens=batch.query_tokens)
    costs = batch.shared_costs
    tasks = shared_tasks(MODEL, shape, lens, batch.groups, device, options=options, costs=costs)
    if tasks is None:
        return
    schedule, shared = tasks.schedule, tasks.schedule.shared
    members = batch.groups.members(lens, page_size=shape.page_size, tile_tokens=16, query_tokens=batch.query_tokens)
    anew, groups = 0.0, set()
    in_l2 = []
    for read in range(len(shared.reads)):
        group = members[shared.members_of(read)[0]]
        whole = int(shared.reads["tiles"][read]) * 16 * heads * options.kv_token_bytes(shape)
        in_l2.append(group in groups and whole <= REREAD_L2_SHARE * l2_mib * 2**20)
        groups.add(group)
    for read, size in zip(shared.read_of_task, tasks.sizes):
        anew += 0.0 if read >= 0 and in_l2[read] else size
    total = tasks.sizes.sum()
    _, memory = read_speeds(MODEL.to_row(), total, batch.columns, 2.0, device.num_sms)
    assert tasks.bandwidth == pytest.approx(memory * total / (anew + (total - anew) / REREAD_SPEEDUP), rel=1e-12)

    reads = read_prices(MODEL, device, shape, options, costs)
    times = run_shared(tasks, MODEL, reads)
    own = shared.read_of_task < 0
    speeds = np.where(own, tasks.alone, min(tasks.alone, reads.read_gb_s * 1e3))
    columns = np.array([0 if read < 0 else len(shared.members_of(read)) * batch.columns for read in shared.read_of_task])
    fixed = np.where(own, MODEL.segment_us, columns * reads.read_us)
    assert (times.end_us - times.start_us >= (fixed + tasks.sizes / speeds) * (1 - 1e-9)).all()
    cta_of = np.repeat(np.arange(schedule.num_ctas), np.diff(schedule.cta_offsets))
    outputs = []
    for row, head in {(int(task["row"]), int(task["kv_head"])) for task in schedule.tasks[own]}:
        of_head = schedule.tasks["kv_head"] == head
        mine = np.flatnonzero(own & of_head & (schedule.tasks["row"] == row))
        read = shared.read_of_row[row]
        parts = np.flatnonzero(of_head & (shared.read_of_task == read)) if read >= 0 else mine[:0]
        if len(parts) + len(mine) > 1:
            outputs.append((int(mine[-1]), [*parts, *mine[:-1]]))
    last, busy = times.end_us.max(), {}
    for task, awaited in sorted(outputs):
        cta = int(cta_of[task])
        begins = busy.get(cta, times.end_us[schedule.cta_offsets[cta + 1] - 1])
        busy[cta] = max([begins, *times.end_us[awaited]]) + reads.row_us + reads.state_us * (len(awaited) + 1)
        last = max(last, busy[cta])
    assert times.makespan_us == pytest.approx(last, rel=1e-12)


@given(
    groups=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 90)), min_size=1, max_size=5), most=st.integers(1, 4),
    tile=st.sampled_from([1, 16]), others=st.integers(0, 999),
)  # fmt: skip
def test_tokens_of_reads_are_those_that_members_leave_out(groups, most, tile, others):
    """Row by row: a member reads its rest, and each read of its group the whole tiles of the prefix."""
    members, prefixes = np.array(groups, np.int64).T
    tokens = others + int((members * prefixes).sum())
    rests, reads, apart = others, 0, 0
    for count, prefix in groups:
        together = prefix // tile * tile if count > 1 else 0
        for _ in range(count):
            rests, apart = rests + prefix - together, apart + together
        reads += together * len(range(0, count, most))
    assert read_tokens(tokens, members, prefixes, most, tile) == (rests + reads, reads, apart)
