"""The timeline's laws, and the closed form's distance from it."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prices import layer_prices
from timeline_reference import step_through

from pkvsim import AttentionOptions, DecodeShape
from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import get_device
from pkvsim.devices.route_model import ROUTES, RouteModel, constants_matrix
from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.timeline.event_loop import Record, Slots, StepTasks, run_tasks
from pkvsim.timeline.time_split import saturated_by
from pkvsim.timeline.timeline import makespan_us, simulate

H200 = get_device("h200")
SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)

routes = st.sampled_from(sorted(H200.routes))
lengths = st.lists(st.integers(0, 40000), min_size=1, max_size=24)
sms = st.integers(1, 140)


@settings(max_examples=60, deadline=None)
@given(route=routes, lens=lengths, num_sms=sms)
def test_work_is_conserved_and_slots_run_one_task_at_a_time(route, lens, num_sms):
    lane = simulate(H200.routes[route], SHAPE, lens, num_sms=num_sms)
    assert lane.bytes.sum() == pytest.approx(useful_kv_bytes(SHAPE, np.array(lens)))
    assert (lane.slot >= 0).all() and (lane.slot < lane.num_slots).all()
    order = np.lexsort((lane.start_us, lane.slot))
    same_slot = lane.slot[order][1:] == lane.slot[order][:-1]
    gaps = lane.start_us[order][1:] - lane.end_us[order][:-1]
    assert (gaps[same_slot] >= -1e-6).all()
    assert (lane.end_us >= lane.start_us).all()


@settings(max_examples=60, deadline=None)
@given(route=routes, lens=lengths, num_sms=sms)
def test_no_faster_than_a_cta_or_all_of_them_can_read(route, lens, num_sms):
    model = H200.routes[route]
    lane = simulate(model, SHAPE, lens, num_sms=num_sms)
    if not len(lane.bytes):
        return
    took = lane.end_us - lane.start_us
    assert (took * (1 + 1e-9) + 1e-6 >= lane.bytes / (lane.cta_gb_s * 1e3)).all()
    busy = np.bincount(lane.slot, took, minlength=lane.num_slots)
    assert lane.makespan_us >= busy.max() - 1e-6 and lane.makespan_us >= took.sum() / lane.num_slots - 1e-6
    # What lies wholly between any task's start and any task's end was read in that time.
    for begin in np.unique(lane.start_us)[::7]:
        inside = lane.start_us >= begin
        ends = lane.end_us[inside]
        order = np.argsort(ends)
        read = np.cumsum(lane.bytes[inside][order])
        assert (read <= lane.shared_gb_s * 1e3 * (ends[order] - begin) * (1 + 1e-9) + 1e-3).all()


@settings(max_examples=40, deadline=None)
@given(route=st.sampled_from([name for name, model in H200.routes.items() if not model.strided]), lens=lengths)
def test_nobody_waits_while_work_is_left(route, lens):
    """Some slot is idle only when the launch has no CTA left to start; strided CTAs keep to their own tasks."""
    lane = simulate(H200.routes[route], SHAPE, lens, num_sms=20)
    if route == "split" or lane.schedule.num_ctas <= lane.num_slots or not len(lane.bytes):
        return
    last_start = lane.start_us[lane.schedule.cta_offsets[:-1]].max()
    ends = [lane.end_us[lane.slot == slot].max() for slot in range(lane.num_slots)]
    assert min(ends) >= last_start - 1e-6


few_lengths = st.lists(st.sampled_from([0, 100, 4096, 4097, 30000]), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(
    route=routes, lens=st.one_of(lengths, few_lengths), num_sms=sms, splits=st.sampled_from([None, None, 1, 9]),
    options=st.builds(AttentionOptions, window=st.sampled_from([None, 1, 700, 9000]), query_tokens=st.integers(1, 8)),
)  # fmt: skip
def test_the_makespan_alone_is_the_simulations(route, lens, num_sms, splits, options):
    how = {"num_sms": num_sms, "splits": splits, "options": options}
    lane = simulate(H200.routes[route], SHAPE, lens, **how)
    assert makespan_us(H200.routes[route], SHAPE, lens, **how) == lane.makespan_us
    assert lane.makespan_us >= lane.end_us.max(initial=0.0)


@settings(max_examples=400, deadline=None)
@given(
    drawn=st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=40), num_slots=st.integers(1, 7),
    rule=st.sampled_from(["a task each", "ranges", "strided"]), cta_us=st.sampled_from([0.0, 1.0]),
    task_us=st.sampled_from([0.0, 1.0, 2.0]), shared=st.sampled_from([1e9, 2.0]),
)  # fmt: skip
@example(  # one slot goes on with its CTA as another starts one, with tasks of the same size
    drawn=[(1, True), (1, False), (1, True), (1, True)], num_slots=2, rule="ranges", cta_us=1.0, task_us=0.0, shared=1e9
)
def test_equal_tasks_that_start_together_run_as_one_by_one(drawn, num_slots, rule, cta_us, task_us, shared):
    """Groups of slots in the event loop against the same laws slot by slot; slots too where no rounding tells ties."""
    count = len(drawn)
    sizes = [size for size, _ in drawn]
    bounds = np.arange(0)
    if rule == "ranges":
        bounds = np.array(sorted({0, count} | {task for task, (_, starts_a_cta) in enumerate(drawn) if starts_a_cta}))
    ctas = [list(range(task, count, num_slots)) for task in range(min(num_slots, count))]
    if rule != "strided":
        edges = bounds if rule == "ranges" else np.arange(count + 1)
        ctas = [list(range(begin, end)) for begin, end in zip(edges, edges[1:])]
    want_slot, want_start, want_end = step_through(
        ctas, sizes, num_slots=num_slots, cta_us=cta_us, task_us=task_us, alone=1.0, shared=shared
    )
    tasks = np.zeros((count, 5), np.int32)
    tasks[:, 0], tasks[:, 4] = np.arange(count), 1
    slot, start, end, read = np.empty(count, np.int32), *np.empty((3, count))
    step = StepTasks(
        tasks, np.array(sizes, np.int32), 16, 1.0, np.array([[0, count]]), np.array([0, 1]), bounds.astype(np.int32),
        rule == "strided", np.zeros(1),
    )  # fmt: skip
    slots = Slots(num_slots, float(cta_us), float(task_us), 1.0, float(shared))
    finish = run_tasks(step, slots, 0.0, Record(slot, start, end, read))
    np.testing.assert_allclose(start, want_start, atol=1e-6)
    np.testing.assert_allclose(end, want_end, atol=1e-6)
    assert finish == end.max()
    if shared == 1e9:
        np.testing.assert_array_equal(slot, want_slot)


def test_by_hand():
    model = RouteModel(rule="whole", bandwidth_gb_s=100, cta_read_gb_s=60, fixed_us=5, task_us=1)
    shape = DecodeShape(1, 1, 125, 16)  # 500 bytes a token
    lane = simulate(model, shape, [12000, 12000, 24000], num_sms=2)  # 6, 6 and 12 MB
    query_us = 3 * 125 * 2 * 2 / 100e3
    start = 5 + query_us
    # Two read 6 MB each at 50 GB/s; the third then reads 12 MB alone at 60.
    np.testing.assert_allclose(lane.end_us, [start + 1 + 120, start + 1 + 120, start + 1 + 120 + 1 + 200])
    assert lane.slot.tolist() == [0, 1, 0] and lane.makespan_us == pytest.approx(lane.end_us[2])


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12), launches=st.integers(1, 3), strided=st.booleans())
def test_tasks_that_start_together_end_by_size(sizes, launches, strided):
    """Whether they have few sizes, which takes no heap, or many."""
    lens = np.array(sizes * launches, np.int32)  # a row a task, of 1 MB a token
    tasks = np.zeros((len(lens), 5), np.int32)
    tasks[:, 0], tasks[:, 4] = np.arange(len(lens)), 1
    bounds = np.arange(launches + 1) * len(sizes)
    slot, start, end, read = np.empty(len(lens), np.int32), *np.empty((3, len(lens)))
    step = StepTasks(
        tasks, lens, 16, 1e6, np.stack((bounds[:-1], bounds[1:]), axis=1), np.arange(launches + 1),
        np.empty(0, np.int32), strided, np.full(launches, 3.0),
    )  # fmt: skip
    finish = run_tasks(step, Slots(12, 1.0, 0.5, 60e3, 200e3), 5.0, Record(slot, start, end, read))
    np.testing.assert_array_equal(read, lens * 1e6)
    assert slot.tolist() == list(range(len(sizes))) * launches
    now = 5.0
    for launch in range(launches):
        mine = slice(launch * len(sizes), (launch + 1) * len(sizes))
        np.testing.assert_allclose(start[mine], now)
        now += 1.5
        read = 0.0
        for place, task in enumerate(np.argsort(sizes, kind="stable")):
            size = sizes[task] * 1e6
            now += (size - read) / min(60e3, 200e3 / (len(sizes) - place))
            read = size
            assert end[mine][task] == pytest.approx(now, rel=1e-9)
        now += 3.0
    assert finish == pytest.approx(now, rel=1e-9)


@pytest.mark.parametrize("route", ROUTES)
def test_pinned_splits_reach_those_that_the_closed_form_pins(route):
    lens = [9000, 9000, 300]
    ours, pinned = (simulate(H200.routes[route], SHAPE, lens, num_sms=132, splits=splits) for splits in (None, 3))
    if route in ("split", "workqueue"):
        assert np.diff(pinned.schedule.split_offsets).tolist() == [3, 3, 3]
    else:
        assert pinned.makespan_us == ours.makespan_us and len(pinned.bytes) == len(ours.bytes)


@settings(max_examples=40, deadline=None)
@given(route=st.sampled_from(["split", "workqueue"]), lens=lengths, num_sms=sms)
def test_strided_ctas_take_every_so_manieth_task(route, lens, num_sms):
    """As the kernel does: CTA b takes tasks b, b + CTAs, .. of a launch, one right after the other."""
    model = H200.routes[route]
    lane = simulate(model, SHAPE, lens, num_sms=num_sms)
    lens = np.array(lens)
    launches = lens[lane.schedule.tasks["row"]] if route == "split" else np.zeros(len(lane.slot))
    for launch in np.unique(launches):
        mine = np.flatnonzero(launches == launch)
        ctas = min(num_sms, len(mine))
        for cta in range(0, ctas, 7):
            own = mine[cta::ctas]
            assert (lane.slot[own] == lane.slot[own[0]]).all()
            np.testing.assert_allclose(lane.start_us[own[1:]], lane.end_us[own[:-1]])
            shortest = lane.bytes[own] / (lane.cta_gb_s * 1e3) + model.task_us
            assert (lane.end_us[own] - lane.start_us[own] >= shortest * (1 - 1e-9) - 1e-9).all()


def test_split_launches_one_length_after_the_other():
    lane = simulate(H200.routes["split"], SHAPE, [8192, 4096, 8192, 0], num_sms=132)
    row = lane.schedule.tasks["row"]
    gap = lane.start_us[row == 1].min() - lane.end_us[row != 1].max()
    model = H200.routes["split"]
    assert gap >= 2 * model.launch_us + model.merge_us  # merge, then the next decode
    assert lane.merge_us >= 2 * model.merge_us


@pytest.mark.parametrize("lens", [[0, 0], []])
@pytest.mark.parametrize("route", sorted(H200.routes))
def test_nothing_to_do(route, lens):
    model = H200.routes[route]
    lane = simulate(model, SHAPE, np.array(lens, np.int32), num_sms=132)
    assert len(lane.bytes) == 0 and model.fixed_us <= lane.makespan_us <= model.fixed_us + model.launch_us


@settings(max_examples=40, deadline=None)
@given(lens=lengths.filter(any), more=st.floats(0.1, 50))
def test_the_workqueue_is_launched_twice(lens, more):
    """To attend and to merge, by the timeline as by the closed form."""
    once = H200.routes["workqueue"]
    twice = replace(once, launch_us=once.launch_us + more)
    for splits in (1, 5):
        line, later = (makespan_us(model, SHAPE, lens, num_sms=132, splits=splits) for model in (once, twice))
        assert later - line == pytest.approx(more)
    closed, later = (layer_prices(lens, SHAPE, constants_matrix({"workqueue": model}), 132)[0].min()
                     for model in (once, twice))  # fmt: skip
    assert later - closed == pytest.approx(more)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 127), head_dim=st.sampled_from([64, 128, 192]), v_head_dim=st.sampled_from([64, 128]),
    query_tokens=st.integers(1, 8),
)  # fmt: skip
def test_a_row_of_one_task_for_each_head_is_priced_exactly(length, head_dim, v_head_dim, query_tokens):
    shape = DecodeShape(32, 8, head_dim, 16)
    options = AttentionOptions(v_head_dim=v_head_dim, query_tokens=query_tokens)
    for route in ("xqa", "split", "workqueue"):
        model = H200.routes[route]
        closed = layer_prices([length], shape, constants_matrix({route: model}), 132, options)[0].min()
        assert closed == pytest.approx(makespan_us(model, shape, [length], num_sms=132, options=options), rel=1e-9)


def test_what_caps_all_ctas_is_named():
    """8 rows of 8 KV heads with 4 KB a token: L2 holds the KV of short rows, and slow SMs read neither fast."""
    model = replace(H200.routes["xqa"], l2_mb=100.0, l2_gb_s=9000.0)
    for changed, length, limit in (({}, 2000, "L2"), ({}, 10_000, "memory"), ({"l2_mb": 0.0}, 2000, "memory"),
                                   ({"sm_heads_gb_s": 160.0}, 2000, "arithmetic")):  # fmt: skip
        route = replace(model, **changed)
        line = simulate(route, SHAPE, [length] * 8, num_sms=132)
        assert saturated_by(route, SHAPE, line, H200) == limit


def ordinary_steps(count=60):
    rng = np.random.default_rng(7)
    heads = [(32, 8), (32, 32), (64, 8), (28, 4), (128, 8)]
    for index in range(count):
        rows = int(2 ** rng.uniform(0, 7))
        if index % 3 == 0:
            lens = rng.integers(256, 65536, rows)
        elif index % 3 == 1:
            lens = np.full(rows, int(2 ** rng.uniform(8, 16)))
        else:
            lens = np.where(np.arange(rows) == 0, 65536, 1024)
        yield DecodeShape(*heads[rng.integers(len(heads))], 128, 16), lens.astype(np.int32)


@pytest.mark.parametrize("name", ["h200", "rtx3060", "l4"])
def test_closed_form_is_close_to_the_timeline(name):
    """Half of all prices within 2 %, nine tenths within 13 %, all within 40 %."""
    device = get_device(name)
    models = device_routes(device)
    apart = []
    for shape, lens in ordinary_steps():
        prices, _ = layer_prices(lens, shape, constants_matrix(models), device.num_sms)
        for route, model in models.items():
            lane = simulate(model, shape, lens, num_sms=device.num_sms)
            apart.append(abs(prices[ROUTES.index(route)] / lane.makespan_us - 1))
    assert np.median(apart) < 0.02 and np.quantile(apart, 0.9) < 0.13 and max(apart) < 0.4


def test_waves_of_rows_nearly_alike_drift_apart():
    """Where they no longer start together the price goes over without a step, near the timeline all the way."""
    rng, apart = np.random.default_rng(11), []
    models = {"xqa": H200.routes["xqa"]}
    for rows in (20, 30, 37, 50, 60):
        below = rng.random(rows)  # how far each row is below the longest, of the furthest
        before = None
        for most in np.linspace(0.0, 0.4, 101):
            lens = np.sort(np.round(200000 * (1 - most * below))).astype(np.int32)[::-1].copy()
            lens[0] = 200000
            price = layer_prices(lens, SHAPE, constants_matrix(models), 132)[0][ROUTES.index("xqa")]
            assert before is None or abs(price / before - 1) < 0.02, (rows, most)
            before = price
            if round(most * 250) % 10 == 0:
                apart.append(abs(price / makespan_us(models["xqa"], SHAPE, lens, num_sms=132) - 1))
    assert np.mean(apart) < 0.06 and max(apart) < 0.11, (np.mean(apart), max(apart))
