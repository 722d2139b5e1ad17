"""What the GPU's scripts print, from canned measurements: every serving table, the paper's page, cells as text."""
from __future__ import annotations

import csv
import re

import numpy as np
import pytest
import serving_trace
from bench.tables import Table, ratio, us
from hypothesis import given
from hypothesis import strategies as st
from paper import cells as paper_cells
from paper import markdown as paper_markdown
from paths import SHARED
from script_cases import ABOUT, SHAPE
from serving import ablate as serving_ablate
from serving import report as serving_report


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
        with open(SHARED / "reference" / name, newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(paper[key])
        for row, ours in zip(rows, paper[key]):
            assert row.keys() == ours.keys()
            for column, text in row.items():
                value = ours[column]
                assert (text == "" and value is None) or text == value or float(text) == value, (column, text, value)
