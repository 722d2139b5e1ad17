"""pkvsim fit beside attention: kernel times into a device file, serving points, and what is refused."""
import csv

import pytest
from command import pkvsim

from pkvsim.devices.device import load_device
from pkvsim.fitting.outside_table import KernelTime, write_kernel_times
from pkvsim.fitting.serving_points import COLUMNS


def products():
    return [
        KernelTime("matrix", "16-bit", tokens=tokens, out_features=4096, in_features=4096, us=10 + tokens * 0.05)
        for tokens in (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
    ]


def test_kernel_times_become_an_entry_of_a_device_file(tmp_path, capsys, monkeypatch):
    write_kernel_times(tmp_path / "times.csv", products())
    out = tmp_path / "mine.json"
    times = str(tmp_path / "times.csv")
    code, printed, err = pkvsim(
        capsys, monkeypatch, "fit", "--outside", times, "--device-base", "l4", "-o", str(out), "--name", "mine"
    )
    assert code == 0, err
    device = load_device(out)
    assert device.name == "mine" and device.outside["pytorch"].status == "measured"
    assert "pytorch" in printed and "measured" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "measurements: expected --measurements, --serving, --served, --outside or --selection"),
        (["--serving", "few.csv"], "serving: expected 24 points of an engine on l4 at least"),
        (["--outside", "few.csv"], "few.csv: expected columns kernel"),
        (["--served", "few.csv"], "few.csv: cannot read served steps"),
        (["--served", "none.json"], "none.json: cannot read cells of bench_serve.py"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with open("few.csv", "w", newline="") as file:
        csv.writer(file).writerow(COLUMNS)
    code, _, err = pkvsim(capsys, monkeypatch, "fit", "--device-base", "l4", "-o", "out.json", *options)
    assert code == 2 and message in err and "Traceback" not in err
