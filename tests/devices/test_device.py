"""The catalogue: every number has a source, files round trip, bad files say what is wrong."""
import json

import pytest
from command import pkvsim

from pkvsim.devices.device import CATALOGUE, DEVICES, NUMBER_FIELDS, OPTIONAL_FIELDS, STATUSES, get_device, load_device


@pytest.mark.parametrize("name", DEVICES)
def test_every_number_has_a_source(name, tmp_path):
    device = get_device(name)
    assert device.name == name and set(NUMBER_FIELDS) <= set(device.sources) <= {*NUMBER_FIELDS, *OPTIONAL_FIELDS}
    assert all((getattr(device, f) is None) == (f not in device.sources) for f in OPTIONAL_FIELDS)
    assert all(s.status in STATUSES and s.source for s in device.sources.values())
    assert device.beta_gb_s < device.peak_gb_s
    path = tmp_path / "mine.json"
    path.write_text(device.to_json())
    again = get_device(str(path))
    assert [getattr(again, f) for f in NUMBER_FIELDS] == [getattr(device, f) for f in NUMBER_FIELDS]
    assert [getattr(again, f) for f in OPTIONAL_FIELDS] == [getattr(device, f) for f in OPTIONAL_FIELDS]
    assert again.sources == device.sources and again.outside == device.outside


def test_the_papers_constants():
    device = get_device("rtx3060")  # arXiv 2606.26666
    assert (device.num_sms, device.beta_gb_s, device.launch_us, device.min_ctas_per_sm) == (28, 302, 8, 4)


def change(**numbers):
    data = json.loads((CATALOGUE / "rtx3060.json").read_text())
    for name, value in numbers.items():
        data["numbers"][name] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "x.json: cannot read a device: "),
        ("[]", "x.json: expected an object with name, label and numbers"),
        ('{"name": 3, "numbers": {}}', "x.json: name: expected text, got 3"),
        ('{"name": "a", "label": "b", "numbers": {}}', "x.json: numbers: missing or unknown: beta_gb_s, "),
        (change(warp=1), "missing or unknown: warp"),
        (change(num_sms=28), "x.json: num_sms: expected value, status and source, got 28"),
        (change(num_sms={"value": 0, "status": "datasheet", "source": "s"}), "num_sms: expected a number > 0, got 0"),
        (change(num_sms={"value": 1.5, "status": "datasheet", "source": "s"}), "num_sms: expected a number, got 1.5"),
        (change(l2_mib={"value": 1, "status": "guess", "source": "s"}), "l2_mib: expected a status of datasheet"),
        (change(compute_capability={"value": 8, "status": "datasheet", "source": "s"}), "compute_capability: "),
    ],
)
def test_bad_device_files(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_device(path)


def test_unknown_device():
    with pytest.raises(ValueError, match="device: expected one of a10, .* or the path of a .json file, got 'b999'"):
        get_device("b999")


DATASHEET = {"status": "datasheet", "source": "s"}


def change_route(**fields):
    data = json.loads((CATALOGUE / "h200.json").read_text())
    model = data["routes"]["balanced"]["model"]
    for name, value in fields.items():
        (model if name in model else data["routes"]["balanced"])[name] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (change_route(fixed_us=float("nan")), "x.json: routes.balanced.model.fixed_us: expected a finite .* got nan"),
        (change_route(bandwidth_gb_s=float("inf")), "model.bandwidth_gb_s: expected a finite number > 0, got inf"),
        (change_route(plan_us=10**400), "routes.balanced.model.plan_us: expected a finite number >= 0, got 1000"),
        ("[" * 100000, "x.json: cannot read a device: maximum recursion depth"),
        ("9" * 5000, "x.json: cannot read a device: Exceeds the limit"),
        (change_route(plan_us=-1), "routes.balanced.model.plan_us: expected a finite number >= 0, got -1"),
        (change_route(merge_us="3"), "routes.balanced.model.merge_us: expected a finite number >= 0, got '3'"),
        (change_route(rule="greedy"), "routes.balanced.model.rule: expected one of whole"),
        (change_route(warp=1), "routes.balanced: unknown: warp"),
        (change_route(date=""), "routes.balanced.date: expected text, got ''"),
        (change_route(status="datasheet"), "routes.balanced.status: expected calibrated or estimated"),
        (change_route(held_out={"measurements": 1}), "routes.balanced.held_out: expected mean_percent, measurements"),
        (
            change_route(held_out={"measurements": 1, "median_percent": 1, "mean_percent": float("nan")}),
            "routes.balanced.held_out.mean_percent: expected a finite number >= 0, got nan",
        ),
        (change_route(model={}), "routes.balanced.model: missing or unknown: bandwidth_gb_s"),
        (change_route().replace('"xqa"', '"warp"'), "routes.warp: expected one of flashinfer_cuda_core"),
        (change(l2_mib=DATASHEET | {"value": float("nan")}), "l2_mib: expected a number > 0, got nan"),
        (change(l2_mib=DATASHEET | {"value": 10**400}), "l2_mib: expected a number > 0, got 1000"),
        (change(l2_mib=DATASHEET | {"value": float("inf")}), "l2_mib: expected a number > 0, got inf"),
    ],
)
def test_bad_numbers_name_file_and_field(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_device(path)


@pytest.mark.parametrize("name", ["h200", "rtx3060"])
def test_calibrated_routes_round_trip_with_source_and_error(name, tmp_path):
    device = get_device(name)
    path = tmp_path / "mine.json"
    path.write_text(device.to_json())
    assert load_device(path).calibration == device.calibration
    for entry in device.calibration.values():
        assert entry.source and entry.date
    assert any(entry.held_out is not None for entry in device.calibration.values())


def test_what_the_devices_command_prints_is_a_device_file(tmp_path, capsys, monkeypatch):
    code, printed, _ = pkvsim(capsys, monkeypatch, "devices", "l4", "--json")
    path = tmp_path / "l4arr.json"
    path.write_text(printed)
    assert code == 0 and get_device(str(path)).to_json() == get_device("l4").to_json()
    path.write_text(json.dumps(json.loads(printed) * 2))
    with pytest.raises(ValueError, match="l4arr.json: expected an object"):
        load_device(path)
