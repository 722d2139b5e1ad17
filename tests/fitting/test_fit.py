"""Readers of measured tables, and what a fit recovers."""
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvsim import DecodeShape
from pkvsim.devices.device import get_device
from pkvsim.devices.route_model import ROUTES
from pkvsim.fitting.fit_device import HOST_FROM, fit_device, select
from pkvsim.fitting.fit_routes import fit_error, fit_route, halves, predict_us
from pkvsim.fitting.fit_starts import fit_starts, free_constants
from pkvsim.fitting.fit_steps import HOST_CONSTANTS, step_constants
from pkvsim.fitting.measured_tables import read_measurements
from pkvsim.fitting.measurements import HEADER, Measurement, format_seq_lens, parse_seq_lens, write_measurements
from pkvsim.pricing.cuts import sorted_lengths
from pkvsim.pricing.layer import heads_of
from pkvsim.pricing.prices import price_route

H200 = get_device("h200")
HEADS = ((32, 8), (32, 32), (64, 8), (128, 8))


def synthetic(route, count=80, noise=0.0, seed=0):
    """Measurements that the H200's own model gives, with log-normal noise."""
    rng = np.random.default_rng(seed)
    measurements = []
    for _ in range(count):
        rows = int(2 ** rng.uniform(0, 6))
        uniform = rng.random() < 0.5
        lens = np.full(rows, int(2 ** rng.uniform(9, 16))) if uniform else rng.integers(256, 65536, rows)
        shape = DecodeShape(*HEADS[rng.integers(len(HEADS))], 128, 16)
        one = Measurement(route=route, shape=shape, seq_lens=tuple(lens.tolist()), kernel_us=1.0)
        us = predict_us(H200.routes[route], [one], num_sms=H200.num_sms)[0] * np.exp(noise * rng.standard_normal())
        measurements.append(replace(one, kernel_us=float(us)))
    return measurements


@pytest.mark.parametrize("route", [r for r in ROUTES if r != "split"])
def test_a_fit_recovers_what_generated_the_times(route):
    train, test = synthetic(route, noise=0.01), synthetic(route, seed=1)
    model = fit_route(train, fit_starts(route, H200), free_constants(route), num_sms=H200.num_sms)
    error = fit_error(model, test, num_sms=H200.num_sms)
    assert error.median_percent < 2 and error.mean_percent < 3 and error.measurements == len(test)


def test_outliers_do_not_pull_the_fit():
    train = synthetic("balanced", noise=0.01)
    spoilt = [replace(m, kernel_us=3 * m.kernel_us) if i % 12 == 0 else m for i, m in enumerate(train)]
    model = fit_route(spoilt, fit_starts("balanced", H200), free_constants("balanced"), num_sms=H200.num_sms)
    assert fit_error(model, synthetic("balanced", seed=1), num_sms=H200.num_sms).mean_percent < 3


def test_prediction_is_the_price():
    lens = [9000, 0, 300]
    one = Measurement(route="split", shape=DecodeShape(32, 8, 128, 16), seq_lens=tuple(lens), splits=6, kernel_us=1.0)
    model = replace(H200.routes["split"], plan_us=11.0)
    rows = sorted_lengths(np.array(lens))
    us, splits = price_route(rows, rows, heads_of(one.shape, 132), model.to_row(), 6)
    assert splits == 6 and predict_us(model, [one], num_sms=132) == [us]
    assert predict_us(model, [replace(one, planned=True)], num_sms=132) == [us + 11]
    two = replace(one, other_steps=((4000,),))
    alone = predict_us(model, [replace(one, seq_lens=(4000,))], num_sms=132)[0]
    assert predict_us(model, [two], num_sms=132) == pytest.approx([(us + alone) / 2])


@given(st.integers(1, 60), st.integers(0, 5))
def test_halves(count, seed):
    train, test = halves(count, seed)
    assert sorted([*train, *test]) == list(range(count)) and 0 <= len(test) - len(train) <= 1


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40).filter(any))
def test_seq_lens_round_trip(lens):
    assert parse_seq_lens(format_seq_lens(lens)) == tuple(lens)


def test_native_table_round_trip(tmp_path):
    shape = DecodeShape(40, 8, 128, 32)
    some = [
        Measurement(
            route="workqueue", shape=shape, seq_lens=(8192,) * 64 + (17,), kernel_us=12.5, splits=20, plan_us=3.0,
            wall_us=40.0,
        ),
        Measurement(route="xqa", shape=shape, seq_lens=(0, 5), kernel_us=7.25),
        Measurement(route="xqa", shape=shape, seq_lens=(5,), kernel_us=7.25, event_us=9.5, run_us=3.25),
    ]
    path = tmp_path / "m.csv"
    write_measurements(path, some)
    assert "8192x64 17,20," in path.read_text() and read_measurements(path) == some
    old = "".join(",".join(line.split(",")[:-2]) + "\n" for line in path.read_text().splitlines())
    path.write_text(old)  # of before steps were timed alone
    assert read_measurements(path) == [replace(m, event_us=None, run_us=None) for m in some]
    with pytest.raises(ValueError, match="expected single steps"):
        write_measurements(path, [replace(some[0], other_steps=((1,),))])


GOOD = "balanced,32,8,128,16,8192x2,,10.5,,"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("balanced,32,8,128,16,8192y2,,10.5,,", r"m.csv:3: column seq_lens: expected lengths such as .*, got '8192y2'"),
        ("balanced,32,8,128,16,0,,10.5,,", "m.csv:3: column seq_lens: expected at least one length > 0"),
        ("balanced,32,8,128,16,9x9999999,,10.5,,", "m.csv:3: column seq_lens"),
        ("balanced,32,8,128,16,8192,,nan,,", "m.csv:3: column kernel_us: expected a time > 0, got 'nan'"),
        ("balanced,32,8,128,16,8192,,inf,,", "m.csv:3: column kernel_us: expected a time > 0"),
        ("balanced,32,8,128,16,8192,,-1,,", "m.csv:3: column kernel_us: expected a time > 0"),
        ("balanced,32,8,128,16,8192,,10.5,-2,", "m.csv:3: column plan_us: expected a time > 0"),
        ("balanced,32,8,128,16,8192,0,10.5,,", "m.csv:3: column splits: expected an integer"),
        ("balanced,32,5,128,16,8192,,10.5,,", "m.csv:3: num_q_heads: expected a multiple"),
        ("balanced,32,8,128,x,8192,,10.5,,", "m.csv:3: column page_size: expected an integer"),
        ("balanced,32,8,128,16,8192,,10.5", "m.csv:3: expected 10 cells"),
    ],
)
def test_bad_rows_name_file_line_and_column(tmp_path, rows, message):
    path = tmp_path / "m.csv"
    path.write_text("\n".join([",".join(HEADER), GOOD, rows, ""]))
    with pytest.raises(ValueError, match=message):
        read_measurements(path)


def test_bad_tables(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="m.csv: expected the columns route, .* of a published table, got a, b"):
        read_measurements(path)
    path.write_text(",".join(HEADER) + "\n")
    with pytest.raises(ValueError, match="expected at least one measurement, got none"):
        read_measurements(path)
    with pytest.raises(ValueError, match="nowhere.csv: cannot read: No such file"):
        read_measurements(tmp_path / "nowhere.csv")


def test_fit_device():
    table = synthetic("balanced", 20, 0.01) + synthetic("xqa", 3)
    fitted, skipped = fit_device(H200, table, source="here", date="2026-01-02", name="mine")
    entry = fitted.calibration["balanced"]
    assert skipped == {"xqa": 3} and fitted.name == "mine"
    assert (entry.status, entry.source, entry.date) == ("calibrated", "here", "2026-01-02")
    assert entry.in_sample.measurements == 20 and entry.held_out is not None
    assert fitted.calibration["xqa"] is H200.calibration["xqa"]
    held, _ = fit_device(H200, table, source="here", date="2026-01-02", free=["fixed_us"])
    old, new = H200.routes["balanced"], held.routes["balanced"]
    assert new == replace(old, fixed_us=new.fixed_us)
    with pytest.raises(ValueError, match="free: expected names of bandwidth_gb_s, .*, got 'warp'"):
        fit_device(H200, table, source="s", date="d", free=["warp"])
    with pytest.raises(ValueError, match="measurements: expected a route with at least 4, got {'xqa': 3}"):
        fit_device(H200, table[20:], source="s", date="d")


def test_the_hosts_times_are_kept_where_asked():
    base = get_device("h200")
    slow = [replace(m, kernel_us=1.2 * m.kernel_us, plan_us=900.0, wall_us=2000.0, event_us=1.2 * m.kernel_us + 3,
                    run_us=90.0) for m in synthetic("split", count=20)]
    for _ in range(2):  # the source does not grow
        fitted, _ = fit_device(base, slow, source="slow host", date="2026-01-02", keep_host=True)
        kept, old = fitted.calibration["split"], H200.calibration["split"]
        assert kept.source == f"slow host{HOST_FROM}{old.source.rpartition(HOST_FROM)[2]}"
        assert all(getattr(kept.model, name) == getattr(old.model, name) for name in HOST_CONSTANTS)
        assert kept.model.isolated_us == 3 and kept.model.bandwidth_gb_s < 0.9 * old.model.bandwidth_gb_s
        base = fitted
    assert base.sources == H200.sources and base.calibration["xqa"] == H200.calibration["xqa"]
    free, _ = fit_device(H200, slow, source="slow host", date="2026-01-02")
    assert free.calibration["split"].model.plan_us == 900
    bare = replace(H200, calibration={})
    with pytest.raises(ValueError, match="^keep_host: expected a model of split in h200"):
        fit_device(bare, slow, source="s", date="d", keep_host=True)


def with_step_times(measurement, *, plan_us, isolated_us=5.0, host_us=20.0, run_us=9.0):
    event_us = measurement.kernel_us + isolated_us
    return replace(measurement, plan_us=plan_us, event_us=event_us, run_us=run_us, wall_us=plan_us + event_us + host_us)


def test_a_steps_constants_come_back():
    """Planning by rows, the first layer's and the host's part, from steps of which one in ten is far off."""
    table = synthetic("xqa", 60, 0.01)
    for layer in range(0, 60, 10):
        table[layer] = replace(table[layer], kernel_us=1.5 * table[layer].kernel_us)
    plans_us = [(30 + 0.5 * len(m.seq_lens)) * (3 if i % 10 == 5 else 1) for i, m in enumerate(table)]
    steps = [with_step_times(m, plan_us=us) for m, us in zip(table, plans_us)]
    model = fit_device(H200, steps, source="s", date="d")[0].routes["xqa"]
    assert (model.isolated_us, model.host_us, model.run_us) == (pytest.approx(5), pytest.approx(20), 9)
    assert model.plan_us == pytest.approx(30, rel=0.02) and model.plan_row_us == pytest.approx(0.5, rel=0.1)


def test_split_plans_by_distinct_lengths():
    table = [replace(m, splits=4) for m in synthetic("split", 40)]
    steps = [with_step_times(m, plan_us=300 + 25 * (len(set(m.seq_lens)) - 1)) for m in table]
    found = step_constants(steps, by_length=True)
    assert found["plan_length_us"] == pytest.approx(25, rel=0.01) and found["plan_us"] == pytest.approx(300, rel=0.01)


def test_without_event_times_the_step_keeps_its_wall_time():
    table = [replace(m, plan_us=float(i), wall_us=m.kernel_us + i + 30) for i, m in enumerate(synthetic("xqa", 7))]
    assert step_constants(table, by_length=False) == {"plan_us": 3.5, "host_us": 30}


def test_select():
    table = [replace(m, device=d) for m in synthetic("xqa", 1) for d in ("a", "b")]
    assert select(table, table_device="a") == table[:1]
    for arguments, message in [
        ({}, "table_device: expected one of a, b, of which"),
        ({"table_device": "c"}, "table_device: expected one of a, b, got 'c'"),
        ({"table_device": "a", "routes": ["split"]}, "route: expected one of xqa, got 'split'"),
    ]:
        with pytest.raises(ValueError, match=message):
            select(table, **arguments)


def test_command(tmp_path, capsys):
    from typer.testing import CliRunner

    from pkvsim.cli import app

    table, out = tmp_path / "m.csv", tmp_path / "mine.json"
    write_measurements(table, synthetic("workqueue", 16, 0.01))
    arguments = ["fit", "--measurements", str(table), "--device-base", "h200", "-o", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "workqueue" in done.output
    entry = json.loads(out.read_text())["routes"]["workqueue"]
    assert entry["source"] == "m.csv" and entry["in_sample"]["measurements"] == 16
    assert get_device(str(out)).routes["workqueue"].rule == "queue"
    done = CliRunner().invoke(app, [*arguments, "--route", "warp"])
    assert done.exit_code == 2 and "route: expected one of workqueue, got 'warp'" in done.output
