"""Counters against the paper's printed digits, and its price formula by hand."""
import numpy as np
import pytest

from pkvsim import DecodeShape, make_schedule
from pkvsim.devices.device import get_device
from pkvsim.policy.paper import PaperPolicy, paper_price_us
from pkvsim.pricing.counters import MIB, flashinfer_counters, schedule_counters
from pkvsim.studies.replay import replay
from pkvsim.traces.paper_families import paper_trace

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
RTX3060 = get_device("rtx3060")

# arXiv 2606.26666, RTX 3060, seed 20260623: (family, requests, max_active, steps), then by engine splits,
# launches, CTA work per SM, useful KV MiB, merge MiB, merge launches. FlashInfer's CTA work is not printed.
PAPER_ROWS = [
    (("bimodal", 24, 8, 48), "flashinfer", None, "1.00", None, "550.5", "0.00", "0.00"),
    (("bimodal", 24, 8, 48), "split", 32, "16.00", "73.1", "550.5", "4.06", "8.00"),
    (("bimodal", 24, 8, 48), "workqueue", 20, "2.00", "45.7", "550.5", "2.54", "1.00"),
    (("uniform", 24, 8, 48), "flashinfer", None, "1.00", None, "671.0", "0.00", "0.00"),
    (("uniform", 24, 8, 48), "split", 32, "16.00", "73.1", "671.0", "4.06", "8.00"),
    (("uniform", 24, 8, 48), "workqueue", 24, "2.00", "54.9", "671.0", "3.05", "1.00"),
    (("zipf", 24, 8, 48), "flashinfer", None, "1.00", None, "672.2", "0.00", "0.00"),
    (("zipf", 24, 8, 48), "split", 32, "16.00", "73.1", "672.2", "4.06", "8.00"),
    (("zipf", 24, 8, 48), "workqueue", 28, "2.00", "64.0", "672.2", "3.55", "1.00"),
    (("bucketed", 16, 1, 64), "flashinfer", None, "1.00", None, "32.1", "0.00", "0.00"),
    (("bucketed", 16, 1, 64), "split", 32, "2.00", "9.1", "32.1", "0.51", "1.00"),
    (("bucketed", 16, 1, 64), "workqueue", 24, "2.00", "6.9", "32.1", "0.38", "1.00"),
]


@pytest.mark.parametrize(("run", "engine", "splits", "launches", "work", "kv", "merge", "merges"), PAPER_ROWS)
def test_counters_equal_the_papers_digits(run, engine, splits, launches, work, kv, merge, merges):
    family, requests, max_active, steps = run
    trace = paper_trace(family, 20260623, requests, max_active, steps)
    policy = PaperPolicy(split_splits=splits, workqueue_splits=splits)
    got = replay(trace, SHAPE, RTX3060, policy)["engines"][engine]
    assert f"{got['launches_per_step']:.2f}" == launches
    assert work is None or f"{got['cta_work_per_sm']:.1f}" == work
    assert f"{got['useful_kv_mib']:.1f}" == kv
    assert f"{got['merge_mib']:.2f}" == merge
    assert f"{got['merge_launches_per_step']:.2f}" == merges


def test_schedule_counters_by_hand():
    lens = np.array([320, 32, 0])
    split = make_schedule("split", SHAPE, lens, splits=4)  # one tile cannot hold 4 splits: 3 CTAs a head idle
    got = schedule_counters(split, SHAPE, lens, RTX3060)
    assert got.useful_kv_bytes == 2 * 352 * 8 * 128 * 2
    assert got.merge_bytes == (4 + 1) * 32 * (2 + 128) * 4
    assert got.cta_work_per_sm == 8 * 5 / 28 and got.nonempty_cta_fraction == 5 / 8
    assert (got.launches, got.merge_launches) == (3, 1)
    queue = schedule_counters(make_schedule("workqueue", SHAPE, lens, splits=4), SHAPE, lens, RTX3060)
    assert queue.nonempty_cta_fraction == 1.0 and queue.merge_bytes == got.merge_bytes
    flashinfer = flashinfer_counters(SHAPE, lens, RTX3060)
    assert flashinfer.cta_work_per_sm == 2 * 8 / 28 and flashinfer.launches == 1


def test_nothing_to_do():
    lens = np.zeros(3, np.int32)
    got = schedule_counters(make_schedule("split", SHAPE, lens, splits=4), SHAPE, lens, RTX3060)
    assert (got.launches, got.merge_bytes, got.nonempty_cta_fraction) == (0, 0, 1.0)


def test_balanced_pays_merge_bytes_for_cut_heads_only():
    lens = np.array([64])
    cut = make_schedule("balanced", SHAPE, lens, num_ctas=16)
    whole = make_schedule("balanced", SHAPE, lens, num_ctas=8)
    assert schedule_counters(cut, SHAPE, lens, RTX3060).merge_bytes == 16 * 4 * (2 + 128) * 4
    assert schedule_counters(whole, SHAPE, lens, RTX3060).merge_bytes == 0


def test_paper_price_reads_mib_over_gb_s_as_ms():
    price = paper_price_us(kv_bytes=302 * MIB, merge_bytes=0, launches=2, ctas_per_sm=8, device=RTX3060)
    assert price == pytest.approx(1000 + 16)
    starved = paper_price_us(kv_bytes=302 * MIB, merge_bytes=151 * MIB, launches=1, ctas_per_sm=2, device=RTX3060)
    assert starved == pytest.approx(2000 + 8 + 500)
