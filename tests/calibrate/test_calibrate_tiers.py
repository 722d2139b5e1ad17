"""python -m gpu.calibrate --tiers without a GPU: disks measured, the file read back by whatif and the tiered cache."""
import errno
import json
from dataclasses import replace

import pytest
from command import pkvsim

from gpu.cache.tiers.device import HostPages
from gpu.cache.tiers.stores import parse_stores
from gpu.cache.tiers.tiered_cache import TieredKVCache
from gpu.calibrate import run
from gpu.calibrate import tiers as calibrate
from gpu.calibrate.tier_rates import disk_rates, host_rates, host_tier
from pkvsim.devices.device import get_device, load_device
from pkvsim.memory.tier_presets import find_tiers


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A device file with two measured disks."""
    folder = tmp_path_factory.mktemp("tiers")
    (folder / "a").mkdir()
    out = folder / "mine.json"
    words = ["--tiers", str(folder / "a"), f"fast={folder}", "-o", str(out), "--device-base", "h200", "--device", "cpu"]
    assert calibrate.main(words) == 0
    return out


def test_the_file_has_what_was_measured(measured):
    device = load_device(measured)
    assert device.name == "mine" and list(device.tiers) == ["disk0", "fast"]
    assert device.calibration and device.host_read_gb_s == get_device("h200").host_read_gb_s
    for tier in device.tiers.values():
        assert not tier.assumed and 1e7 < tier.read_bytes_per_s < 1e11 and tier.capacity_bytes > 2**20
        assert "random blocks of 2 MiB" in tier.source and 0 <= tier.read_latency_s < 1
    assert load_device(measured).to_json() == measured.read_text()
    again = calibrate.main(["--tiers", f"fast={measured.parent}", "-o", str(measured), "--device", "cpu"])
    assert again == 0 and load_device(measured).tiers["disk0"] == device.tiers["disk0"]  # others stay


def test_whatif_and_the_cache_read_it_back(measured, tmp_path, capsys, monkeypatch):
    device = load_device(measured)
    load = ("--input-tokens", "600", "--output-tokens", "4", "--requests", "9", "--turns", "3")
    code, out, err = pkvsim(capsys, monkeypatch, "whatif", "--device", str(measured), *load, "--policies", "balanced",
                            "--tier", "disk0:64MiB", "--tier", "fast", "--json")  # fmt: skip
    assert code == 0, err
    found = json.loads(out)["config"]["tiers"]["tiers"]
    assert found[0]["read_bytes_per_s"] == device.tiers["disk0"].read_bytes_per_s
    assert found[0]["capacity_bytes"] == 2**26 and not found[1]["assumed"]
    host, disks = parse_stores(["host:1MiB:50", f"disk0:1MiB={tmp_path}"], device.tiers, pin=False)
    pages = HostPages(num_pages=8, num_layers=2, run_bytes=4096)
    with TieredKVCache(pages, host=host, disks=disks) as cache:
        cache.store([b"a", b"b"], [0, 1]).wait()
        assert cache.load([b"a", b"b"], [2, 3]).wait() == 2
        assert cache.stats()["disk0"]["weight_bytes_per_s"] == device.tiers["disk0"].read_bytes_per_s


def test_host_memory_and_the_link_go_into_the_file():
    pages = HostPages(num_pages=16, num_layers=2, run_bytes=2**16)
    rates = host_rates(pages, 2**20, node=None, pin=False)
    tier = host_tier("host", rates, 2**30, "copied by the processor")
    base = get_device("rtx3060")
    device = calibrate.completed(base, {"host": tier}, {"in_gb_s": 12.5, "out_gb_s": 12.0, "both_gb_s": 10.0})
    assert (device.host_read_gb_s, device.host_write_gb_s) == (12.5, 12.0) and device.sources["host_read_gb_s"].source
    assert find_tiers(["host:2GiB"], device.tiers) == (replace(tier, capacity_bytes=2**31),)
    assert tier.capacity_bytes == 2**29 and tier.read_bytes_per_s > 1e8 and base.tiers == {}


def test_a_disk_that_cannot_hold_the_blocks_is_named(tmp_path):
    with pytest.raises(ValueError, match="directory"):
        disk_rates(tmp_path, HostPages(num_pages=1, num_layers=1, run_bytes=2**20), 2**55, pin=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", ["mkdtemp", "a block", "the file"])
def test_what_goes_wrong_while_it_measures_is_one_line(tmp_path, monkeypatch, capsys, fails):
    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    out = tmp_path / "new" / "mine.json"
    if fails == "mkdtemp":
        monkeypatch.setattr("tempfile.mkdtemp", read_only)
    elif fails == "a block":
        monkeypatch.setattr("gpu.cache.tiers.disks.disk_tier.read_header", lambda *_: ("no valid header", (0, 0)))
    else:
        out.mkdir(parents=True)
    (tmp_path / "a=b").mkdir()
    words = ["--tiers", str(tmp_path / "a=b"), "-o", str(out), "--device-base", "h200", "--device", "cpu"]
    assert calibrate.main(words) == 2
    said = capsys.readouterr().err.splitlines()
    expected = {"mkdtemp": "Read-only file system", "a block": "'last_fault': 'no valid header'", "the file": "directory"}
    assert said[-1].startswith("gpu.calibrate: error: ") and expected[fails] in said[-1]
    assert not list((tmp_path / "a=b").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tiers", "/nowhere", "-o", "x.json"], "expected directories, got /nowhere"),
        (["--tiers", "/tmp", "-o", "x.csv"], "expected a file name that ends in .json"),
        (["--tiers", "/tmp", "-o", "/nowhere/x.json"], "name a GPU by --device-base"),
        (["--tiers", "a:b=/tmp", "-o", "x.json", "--device-base", "h200"], "without colons"),
        (["--tiers", "-o", "x.json", "--device-base", "h200", "--device", "cpu"], "expected directories with --device"),
        (["--tiers", "host=/tmp", "-o", "x.json", "--device-base", "h200"], "do not begin with host"),
    ],
)
def test_wrong_words(words, message, capsys):
    with pytest.raises(SystemExit):
        calibrate.parse_args(words)
    assert message in capsys.readouterr().err


def test_the_help_of_calibration_names_what_else_it_measures(capsys):
    with pytest.raises(SystemExit):
        run.parse_args(["--help"])
    assert {"--tiers", "--outside"} <= {*capsys.readouterr().out.split()}


def test_a_devices_tiers_are_listed_with_its_numbers(measured, capsys, monkeypatch):
    code, out, err = pkvsim(capsys, monkeypatch, "devices", str(measured))
    assert code == 0 and "tier disk0" in out and "tier fast" in out and "GB/s" in out


def test_stores_that_fit_no_tier():
    for texts in (["host:1GiB:50=/tmp"], ["disk:1GiB:1"], ["unified_pool"]):
        with pytest.raises(ValueError, match="tiers"):
            parse_stores(texts)


@pytest.mark.parametrize(
    "entry", [1, {"name": "a"}, {"name": "a", "kind": "tape"}, {"name": "a", "capacity_bytes": "1"}, {"nome": "a"}]
)
def test_a_device_file_with_odd_tiers_is_refused(entry, tmp_path):
    data = json.loads(get_device("l4").to_json()) | {"tiers": {"a": entry}}
    (tmp_path / "odd.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="tiers.a: "):
        load_device(tmp_path / "odd.json")
