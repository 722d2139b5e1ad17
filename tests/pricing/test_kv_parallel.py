"""pkvsim.pricing.kv_parallel and studies.several.kv_parallel against a plain statement of their arithmetic."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim.devices.device import get_device
from pkvsim.options import AttentionOptions
from pkvsim.pricing.kv_parallel import DEFAULT_LINK_US, MERGE_US, exchange_bytes, exchange_us
from pkvsim.schedule.shares import PageShares
from pkvsim.shapes import DecodeShape
from pkvsim.studies.explain_step import explain_step
from pkvsim.studies.several.kv_parallel import explain_kv_parallel

H200 = get_device("h200")


@given(st.integers(0, 300), st.integers(1, 8), st.sampled_from(["head", "row", "all"]), st.sampled_from([64, 128, 256]))
def test_states_are_counted_once_for_each_peer(rows, ranks, owner, head_dim) -> None:
    shape = DecodeShape(32, 8, head_dim, 16)
    states = 0
    for _ in range(rows * 32):
        states += (ranks - 1) if owner == "all" else (ranks - 1) / ranks
    size = exchange_bytes(shape, rows, ranks, owner=owner)
    assert size == pytest.approx(states * (head_dim + 2) * 4)
    us = exchange_us(shape, rows, H200, ranks, owner=owner)
    if ranks == 1 or rows == 0:
        assert us == 0
    else:
        last = size if rows * 8 <= H200.num_sms else size * H200.num_sms / (rows * 8)
        assert us == pytest.approx(0.68 + last / 450e3 + MERGE_US)


def test_a_device_that_does_not_say_has_a_slow_link() -> None:
    bare = replace(H200, link_us=None)
    assert exchange_us(DecodeShape(32, 8, 128, 16), 1, bare, 2) - exchange_us(
        DecodeShape(32, 8, 128, 16), 1, H200, 2) == pytest.approx(DEFAULT_LINK_US - 0.68)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 40000), min_size=1, max_size=6), st.sampled_from([(1, 1), (7, 3), (1, 1, 1), (0, 1)]))
def test_a_step_is_its_slowest_rank_and_the_exchange(lens, dealt) -> None:
    shape, shares = DecodeShape(32, 8, 128, 16), PageShares(16, dealt)
    report = explain_kv_parallel(shape, lens, H200, shares=shares, layers=3)
    alone = [explain_step(shape, shares.local_lens(lens, rank), H200, routes=("balanced",), layers=3).routes[0]
             for rank in range(len(dealt))]
    exchange = exchange_us(shape, sum(length > 0 for length in lens), H200, len(dealt))
    assert report.layer_us == pytest.approx(max(one.closed_us for one in alone) + exchange)
    assert report.step_us == pytest.approx(max(one.step_us for one in alone) + 3 * exchange)
    assert sum(rank.seq_lens for rank in report.ranks).tolist() == lens


def test_two_gpus_halve_a_long_row() -> None:
    report = explain_kv_parallel(DecodeShape(32, 8, 128, 16), [131072], H200)
    assert 0.5 < report.layer_us / report.whole.routes[0].closed_us < 0.58
    assert report.to_dict()["pages_of_rank"] == [1, 1]


@pytest.mark.parametrize(("more", "name"), [
    ({"num_ranks": 9}, "num_ranks"), ({"owner": "me"}, "owner"), ({"options": AttentionOptions(window=8)}, "window"),
    ({"options": AttentionOptions(query_tokens=2)}, "query_tokens"), ({"shares": PageShares(32, (1, 1))}, "shares"),
    ({"shares": (1, 1)}, "shares"),
])
def test_what_cannot_be_is_refused_by_name(more, name) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        explain_kv_parallel(DecodeShape(32, 8, 128, 16), np.array([100]), H200, **more)
