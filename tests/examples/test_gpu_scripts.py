"""The GPU's scripts as far as no GPU is needed: options, cells, traces, files."""
from __future__ import annotations

import json
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import reproduce_paper
import serving_trace
import without_gpu
from script_cases import ABOUT, SHAPE
from serving.options import EQUAL_BUCKETS, HELD_OUT_SEEDS, Config, configs, equal_buckets, make_trace

from gpu.calibrate import constants as calibration_constants
from gpu.calibrate import run as calibrate
from gpu.calibrate.cells import MAX_KV_BYTES, SEED, calibration_cells
from gpu.measure.environment import gpu_slug, write_json
from gpu.measure.progress import tracked
from pkvsim import DecodeShape
from pkvsim.devices.device import NUMBER_FIELDS, NumberSource, load_device
from pkvsim.devices.route_model import OWN_ROUTES, ROUTES

SCRIPTS = ("gpu/calibrate/run.py", "examples/serving_trace.py", "examples/reproduce_paper.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_a_machine_without_a_gpu(script):
    """One process each: imports, --help, and the sentence that says what is missing."""
    done = without_gpu.run_main(script.removesuffix(".py").replace("/", "."))
    assert "--quick" in done.stdout
    assert re.fullmatch(r"\w+ needs a CUDA GPU with CuPy and PyTorch; torch is not installed: .*\n", done.stderr)


@pytest.mark.parametrize(
    ("parse", "words", "said"),
    [
        (serving_trace.parse_args, "--heads 32/5", "--heads: expected QUERY/KV heads"),
        (serving_trace.parse_args, "--families bimodal,nothing", "--families: expected one of uniform"),
        (serving_trace.parse_args, "--max-active 0", "--max-active: expected an integer >= 1, got '0'"),
        (serving_trace.parse_args, "--seeds 1,,2", "--seeds: expected comma-separated values"),
        (serving_trace.parse_args, "--hole-fraction 1", r"--hole-fraction: expected a number in \[0, 1\)"),
        (serving_trace.parse_args, "--engines cuda", "--engines: expected one of flashinfer_cuda_core"),
        (serving_trace.parse_args, "--engines adaptive", "--engines: expected at least one of"),
        (serving_trace.parse_args, "--engines split --exhaustive", "--exhaustive: expected adaptive"),
        (serving_trace.parse_args, "--trace-file nowhere.csv", "--trace-file: expected a file, got nowhere.csv"),
        (serving_trace.parse_args, "--pool-gib -1", "--pool-gib: expected a number > 0"),
        (reproduce_paper.parse_args, "-o page.txt", "--out: expected a file name that ends in .md"),
        (reproduce_paper.parse_args, "--time-limit 0", "--time-limit: expected a number > 0"),
        (calibrate.parse_args, "-o mine.csv", "--out: expected a file name that ends in .json"),
        (calibrate.parse_args, "--repeats 0", "--repeats: expected at least 1"),
    ],
)
def test_bad_options_are_named(parse, words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(words.split())
    assert stopped.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_configurations():
    args = serving_trace.parse_args("--heads 32/32,32/4 --max-active 1,4,8,32 --quick".split())
    found = configs(args)
    assert [(c.label, c.requests, c.steps) for c in found[:4]] == [
        ("B1 32/32", 16, 12),
        ("B4 32/32", 16, 12),
        ("B8 32/32", 24, 12),
        ("B32 32/32", 96, 12),
    ]
    assert args.seeds == HELD_OUT_SEEDS[:1]
    full = configs(serving_trace.parse_args("--max-active 1,8".split()))
    assert [c.steps for c in full] == [64, 48]


def test_paper_and_equal_traces():
    args = serving_trace.parse_args([])
    config = Config(DecodeShape(**SHAPE), 8, 24, 48)
    trace = make_trace(args, config, "bimodal", 20260623)
    assert int(trace.reserved_pages().sum()) == 24285
    equal = make_trace(args, replace(config, max_active=1, steps=64), EQUAL_BUCKETS, 20260623)
    lengths = np.concatenate([step.seq_lens for step in equal.iter_steps()])
    assert lengths.tolist() == [start + i for start in (8192, 16384, 32768, 65536) for i in range(16)]
    assert len(list(equal_buckets(1, 3, page_size=16).iter_steps())) == 4


def test_calibration_cells():
    cells, quick = calibration_cells(quick=False), calibration_cells(quick=True)
    assert {cell.shape.group_size for cell in cells} == {1, 4, 8, 16} and len(quick) * 4 < len(cells)
    assert all(cell.kv_bytes <= MAX_KV_BYTES and min(cell.seq_lens) > 0 for cell in cells)
    assert SEED == 20260622 and SEED not in HELD_OUT_SEEDS
    for some in (cells, quick):
        counts = {route: 0 for route in ROUTES}
        for cell in some:
            for route, splits in cell.timings(ROUTES):
                counts[route] += 1
                assert (splits is not None) == (route in ("split", "workqueue"))
        assert min(counts.values()) >= 8, counts
    assert all(route in OWN_ROUTES for cell in cells for route, _ in cell.timings(OWN_ROUTES))


def measured() -> calibration_constants.MeasuredConstants:
    return calibration_constants.MeasuredConstants(
        stream_us={1: 2.0},
        beta_gb_s=4548.123,
        cta_read_gb_s=70.0,
        min_ctas_per_sm=2,
        launch_us=2.3456789,
        eager_sync_us=9.0,
        graph_replay_us=6.0,
        graph_kernel_us=1.0,
        fp16_tflops=800.0,
    )


def test_a_measured_device_has_every_number_with_its_source(tmp_path):
    stated = {
        "compute_capability": (9, 0),
        "num_sms": 132,
        "memory_gib": 139.8,
        "l2_mib": 50.0,
        "smem_per_sm_kib": 228.0,
        "peak_gb_s": 4800.0,
    }
    run = NumberSource("calibrated", calibration_constants.calibration_source(ABOUT))
    spec = calibration_constants.spec_of(
        stated, measured(), driver=NumberSource("datasheet", "driver"), run=run, label="NVIDIA H200", name="mygpu"
    )
    assert set(spec.sources) == set(NUMBER_FIELDS)
    assert spec.beta_gb_s == 4548 and spec.launch_us == 2.346 and "python -m gpu.calibrate, 2026-11-21" in run.source
    path = tmp_path / "mygpu.json"
    path.write_text(spec.to_json())
    assert load_device(path).sources == spec.sources
    assert {f.name for f in fields(calibration_constants.MeasuredConstants)} >= {"graph_replay_us", "eager_sync_us"}


def test_names_and_files(tmp_path, capsys):
    assert [gpu_slug(name) for name in ("NVIDIA H200", "NVIDIA GeForce RTX 3060", "NVIDIA L40S")] == [
        "h200",
        "rtx3060",
        "l40s",
    ]
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1} and list(path.parent.iterdir()) == [path]
    assert list(tracked([1, 2], "counting")) == [1, 2]
    assert capsys.readouterr().err == "counting: 1 of 2, 1, 0 s\ncounting: 2 of 2 done, 0 s\n"
