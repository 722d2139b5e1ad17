"""The paper's gates, split counts and choices."""
import re

import numpy as np
import pytest

from pkvsim import DecodeShape
from pkvsim.devices.device import get_device
from pkvsim.policy.by_name import PAPER_ROUTES, PaperPolicy

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
RTX3060 = get_device("rtx3060")


@pytest.mark.parametrize(
    ("shape", "lens", "route", "reason"),
    [
        (SHAPE, [32768], "split", "cheapest of flashinfer .*, split"),
        (SHAPE, [0, 32768, 0], "split", "cheapest"),
        (SHAPE, [16383], "flashinfer", "longest row 16383 under 16384 tokens"),
        (SHAPE, [16384], "split", "cheapest"),
        (SHAPE, [32768] * 2, "flashinfer", "cheapest of flashinfer [0-9]+ us$"),
        (SHAPE, [32768] * 7, "flashinfer", "cheapest of flashinfer [0-9]+ us$"),
        (SHAPE, [32768] + [2048] * 7, "workqueue", "cheapest of flashinfer .*, workqueue"),
        (SHAPE, [32768] * 64, "flashinfer", "workqueue"),
        (SHAPE, [0, 0], "flashinfer", "no active row"),
        (DecodeShape(32, 4, 128, 16), [32768] * 8, "flashinfer", "group size 8, not 4"),
        (DecodeShape(32, 32, 128, 16), [32768], "flashinfer", "group size 1, not 4"),
    ],
)
def test_routes(shape, lens, route, reason):
    decision = PaperPolicy().decide(shape, np.array(lens, np.int32), RTX3060)
    assert decision.route == route
    assert set(decision.prices) == set(PAPER_ROUTES)
    assert (decision.splits is None) == (route == "flashinfer")
    assert re.search(reason, decision.reason)


def test_min_context_of_zero_reproduces_the_papers_logs():
    lens = np.array([8192], np.int32)
    assert PaperPolicy().decide(SHAPE, lens, RTX3060).route == "flashinfer"
    assert PaperPolicy(min_context=0).decide(SHAPE, lens, RTX3060).route == "split"


@pytest.mark.parametrize(
    ("lens", "splits"),
    [
        ([8192], 32),  # ceil(256 / 8) = 32 over ceil(256 / 96) = 3
        ([131072], 44),  # ceil(4096 / 96) = 43, up to 44
        ([262144], 48),  # 86, cut to 48
        ([65536] * 8, 24),  # ceil(256 / 64) = 4 under ceil(2048 / 96) = 22, up to 24
        ([65536, 320] + [8192] * 6, 10),  # the shortest row has 10 tiles
        ([65536, 32], 4),  # never under 4, even of one tile
    ],
)
def test_split_counts(lens, splits):
    got = PaperPolicy().split_counts("split", SHAPE, np.array(lens, np.int32))
    assert got.tolist() == [splits] * len(lens)


@pytest.mark.parametrize(
    ("lens", "splits"),
    [
        ([8192] * 8, [4] * 8),  # 256 / 64 = 4 CTAs and 256 / 64 = 4 by tiles
        ([65536] + [2048] * 7, [24] + [4] * 7),  # 2048 / 64 = 32, cap 24 from 8 rows
        ([65536] * 4, [32] * 4),
        ([131072] * 5, [32] * 5),  # cap 32 from 4 to 7 rows
        ([131072] * 2, [40] * 2),  # cap 40 at 2
        ([131072] * 3, [48] * 3),
        ([131072], [48]),
        ([8192], [32]),
        ([320], [10]),  # as many as tiles
        ([32, 0], [4, 4]),  # never under 4; the schedule cuts it to the tiles there are
    ],
)
def test_workqueue_counts(lens, splits):
    assert PaperPolicy().split_counts("workqueue", SHAPE, np.array(lens, np.int32)).tolist() == splits


def test_pinned_counts_and_prices():
    policy = PaperPolicy(split_splits=32, workqueue_splits=20)
    lens = np.array([32768] + [8192] * 7, np.int32)
    decision = policy.decide(SHAPE, lens, RTX3060)
    assert decision.splits.tolist() == [20] * 8
    kv_mib = (32768 + 7 * 8192) * 4096 / 2**20
    merge_mib = 8 * 20 * 32 * 130 * 4 / 2**20
    assert decision.prices["workqueue"] == pytest.approx((kv_mib + merge_mib) / 302 * 1e3 + 16)
    assert decision.prices["flashinfer"] == pytest.approx(kv_mib / 302 * 1e3 * 4 / (64 / 28) + 8)
    assert decision.prices["split"] == pytest.approx((kv_mib + merge_mib * 32 / 20) / 302 * 1e3 + 2 * 2 * 8)


@pytest.mark.parametrize("name", ["min_context", "split_splits", "workqueue_splits"])
def test_bad_policy(name):
    with pytest.raises(ValueError, match=f"{name}: expected an integer"):
        PaperPolicy(**{name: -1})
