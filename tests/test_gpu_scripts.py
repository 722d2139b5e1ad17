"""The GPU's scripts as far as no GPU is needed: options, cells, traces, and every table from canned measurements."""
from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SHARED = ROOT.parent / "shared" / "reference"
sys.path.insert(0, str(EXAMPLES))

import paper_cells
import paper_markdown
import reproduce_paper
import serving_ablate
import serving_report
import serving_trace
from result_tables import Table, ratio, us
from serving_options import EQUAL_BUCKETS, HELD_OUT_SEEDS, Config, configs, equal_buckets, make_trace

from gpu import calibrate, calibration_constants
from gpu.calibration_cells import MAX_KV_BYTES, SEED, calibration_cells
from gpu.environment import gpu_slug, write_json
from gpu.progress import tracked
from pkvsim import DecodeShape
from pkvsim.device import NUMBER_FIELDS, NumberSource, load_device
from pkvsim.route_model import OWN_ROUTES, ROUTES

SCRIPTS = ("gpu/calibrate.py", "examples/serving_trace.py", "examples/reproduce_paper.py")
SHAPE = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16}
ABOUT = {
    "gpu": "NVIDIA H200",
    "driver": "580",
    "torch": "2.11",
    "cuda": "13.0",
    "cupy": "14.2",
    "flashinfer": "0.7.2",
    "source_hash": "0",
    "command": "python -m  gpu.calibrate",
    "date": "2026-11-21T10:00:00+00:00",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_a_machine_without_a_gpu(script):
    """One process each: imports, --help, and the sentence that says what is missing."""
    module = script.removesuffix(".py").replace("/", ".")
    code = (
        f"import sys; sys.path[:0] = ['.', 'examples']; import importlib.util as u; real = u.find_spec\n"
        f"u.find_spec = lambda name, *a: None if name in ('torch', 'cupy') else real(name, *a)\n"
        f"import {module} as script\nprint(script.main([]), {{'torch', 'cupy'}} & set(sys.modules))\nscript.main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 set()") and "--quick" in done.stdout and "--json" in done.stdout
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


def record(seed: int, **engines: list[float]) -> dict:
    """Two steps of one row; wall is event plus 100, or plus 10 for ours."""
    rows = {}
    for name, event in engines.items():
        extra = 100.0 if name in serving_report.FLASHINFER else 10.0
        rows[name] = {"event_us": event, "wall_us": [us_ + extra for us_ in event], "plan_us": [1.0, 1.0]}
    counters = {
        "launches": 2.0,
        "merge_launches": 1.0,
        "cta_work_per_sm": 3.0,
        "useful_kv_bytes": 2.0**20,
        "merge_bytes": 0.0,
        "nonempty_cta_fraction": 1.0,
    }
    return {
        "label": "B1 32/8",
        "family": "bucketed",
        "seed": seed,
        "layers": 1,
        "caches": 1,
        "shape": SHAPE,
        "max_active": 1,
        "physical_pages": 7,
        "left_out": {},
        "wrong": {},
        "baseline": "flashinfer_tensor_core",
        "active": [1, 1],
        "kv_mib": [1.0, 1.0],
        "decisions": ["balanced", "workqueue"],
        "prices": {"balanced": [20.0, 22.0]},
        "model_host_us": {"balanced": [2.0, 2.0]},
        "engines": rows,
        "counters": {"split": counters, "workqueue": counters},
        "errors": {name: {"difference": 1e-4, "float64_error": 2e-4} for name in rows},
    }


RECORDS = [
    record(
        20260623,
        flashinfer_tensor_core=[40.0, 60.0],
        flashinfer_cuda_core=[30.0, 80.0],
        balanced=[20.0, 30.0],
        workqueue=[25.0, 24.0],
        adaptive=[20.0, 24.0],
    ),
    record(
        20260624,
        flashinfer_tensor_core=[40.0, 40.0],
        flashinfer_cuda_core=[50.0, 50.0],
        balanced=[10.0, 10.0],
        workqueue=[20.0, 20.0],
        adaptive=[10.0, 20.0],
    ),
]


def test_ratios_are_of_means_by_seed_and_best_is_one_configuration():
    (group,) = serving_report.groups(RECORDS)
    assert group.best_flashinfer("event_us") == "flashinfer_tensor_core"  # 45 us on average, cuda cores 52.5
    assert group.ratios("balanced", "event_us", "flashinfer_tensor_core") == [2.0, 4.0]
    assert group.ratios("balanced", "wall_us", "flashinfer_tensor_core") == [150 / 35, 140 / 20]
    assert group.ratios("balanced", "event_us", None) == [] == group.ratios("balanced", "event_us", "xqa")
    table = serving_report.times_table(group)
    row = dict(zip(table.columns, next(row for row in table.rows if row[0] == "balanced")))
    assert row["event us"] == "17.5" and row["x default, event"] == "3.00 ± 1.41"
    assert row["tokens/s"] == f"{4 / (110e-6):.0f}"


def test_regret_is_against_the_fastest_fixed_route_of_each_step():
    np.testing.assert_allclose(serving_report.step_regrets(RECORDS[0], "event_us"), [0.0, 0.0])
    np.testing.assert_allclose(serving_report.step_regrets(RECORDS[1], "event_us"), [0.0, 1.0])
    table = serving_report.regret_table(serving_report.groups(RECORDS))
    assert table.rows[-1][:3] == ("all", "25.00", "100.0")


def test_prediction_errors_split_the_kernel_from_the_plan():
    kernel, step = serving_report.prediction_errors(RECORDS[0], "balanced")
    np.testing.assert_allclose(kernel, [18 / 20 - 1, 20 / 30 - 1])
    np.testing.assert_allclose(step, [20 / 30 - 1, 22 / 40 - 1])


def test_every_serving_table_prints(capsys):
    layers = [
        {
            "label": "B1",
            "family": "zipf",
            "seed": 1,
            "rows": 4,
            "weight_bytes": 10**6,
            "rest_us": 100.0,
            "engines": {"balanced": {"attention_us": 50.0, "layer_us": 150.0}},
        }
    ]
    ablations = [
        {
            "label": "B1",
            "family": "zipf",
            "seed": 1,
            "steps": 1,
            "splits": {"split": {"1": 9.0}},
            "graphs": {"balanced": {"eager_us": 20.0, "graph_us": 10.0, "plans_in_graph": True}},
            "packing": {"workqueue": {"kernel_us": 9.0, "launches": 2.0, "merge_mib": 0.5, "nonempty_ctas": 0.25}},
        }
    ]
    serving_trace.print_document({"runs": RECORDS, "layers": layers, "ablations": ablations}, exhaustive=True)
    printed = capsys.readouterr().out
    for part in (
        "B1 32/8 bucketed",
        "steps by route",
        "regret",
        "predicted against measured",
        "largest errors",
        "adaptive against FlashInfer",
        "33%",
        "833",
        "kernel us by splits",
        "25%",
    ):
        assert part in printed, part


def test_the_page_of_the_paper_renders_at_any_point():
    cells = [{"tokens": 8192, "kv_bytes": 33554432, "limit_us": 9.0, "us": {"balanced": 14.0, "xqa": 16.0}}]
    sweep = [{"splits": 16, "us": {"split": 20.0, "workqueue": 21.0}}]
    ragged = [{"spread": 1, "seq_lens": [1], "us": {"balanced": 10.0, "flashinfer_tensor_core": 12.0, "xqa": 11.0}}]
    groups = [{"group": 4, "case": "1 x 8K", "us": {"balanced": 10.0}}]
    document = {"environment": ABOUT}
    pages = [paper_markdown.render(document)]
    for key, value in (
        ("isolated", cells),
        ("serving", RECORDS),
        ("splits", sweep),
        ("ragged", ragged),
        ("groups", groups),
    ):
        document[key] = value
        pages.append(paper_markdown.render(document))
    assert all(longer.count("\n## ") > shorter.count("\n## ") for shorter, longer in zip(pages, pages[1:]))
    page = pages[-1]
    assert "| 8192 | vllm 0.6.4 | - | - | 149.7 |" in page and "| 16 | 20.0 | 21.0 | 164.0 |" in page
    assert "| 1 | 10.0 | 12.0 | 11.0 | 1.20 | 1.10 |" in page  # ours against the default and the best
    assert re.search(r"\| flashinfer_tensor_core .*\| 214.0 \| 233.0 \| 1.00 \| 1.00 \|", page)
    for line in page.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


@given(rows=st.lists(st.tuples(st.text(max_size=5), st.floats(0, 1e6)), max_size=5))
def test_markdown_has_as_many_cells_in_every_line(rows):
    table = Table(
        "t", ("a", "b"), tuple((text.replace("\n", " ").replace("\r", " "), us(value)) for text, value in rows)
    )
    lines = [line for line in table.markdown().split("\n") if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in lines)


def test_numbers_as_text():
    assert [us(value) for value in (None, 9.04, 999.94, 1234.5)] == ["-", "9.0", "999.9", "1234"]
    assert [ratio(values) for values in ([], [2.0], [1.0, 3.0])] == ["-", "2.00", "2.00 ± 1.41"]
    with pytest.raises(ValueError, match="rows: expected 2 cells"):
        Table("t", ("a", "b"), (("1",),))


@given(st.integers(1, 64))
def test_spread_lengths(spread):
    lens = paper_cells.spread_lengths(spread)
    assert len(lens) == 8 and abs(lens.mean() - 16384) < 1 and (np.diff(lens) >= 0).all()
    assert abs(lens[-1] / lens[0] - spread) < 0.1


@given(st.lists(st.integers(1, 70000), min_size=1, max_size=16))
def test_masked_splits_cover_each_row_and_no_more(lens):
    lens = np.array(lens, np.int32)
    splits, tiles = serving_ablate.masked_splits(lens), -(-lens // serving_ablate.TILE_TOKENS)
    cut = -(-int(tiles.max()) // serving_ablate.BUCKET_SPLITS)
    assert (splits <= serving_ablate.BUCKET_SPLITS).all()
    assert ((splits - 1) * cut < tiles).all() and (splits * cut >= tiles).all()


@pytest.mark.skipif(not SHARED.exists(), reason="the reference figures are not here")
def test_embedded_figures_are_the_references():
    paper = paper_markdown.paper_figures()
    for key, name in (("serving", "rtx3060_paper_seed20260623.csv"), ("kernels", "rtx3060_paper_kernels.csv")):
        with open(SHARED / name, newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(paper[key])
        for row, ours in zip(rows, paper[key]):
            assert row.keys() == ours.keys()
            for column, text in row.items():
                value = ours[column]
                assert (text == "" and value is None) or text == value or float(text) == value, (column, text, value)
