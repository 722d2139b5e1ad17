"""Whether tokens of two engines agree: peers that round alike do, kernels that are wrong do not, whatever they swap."""
from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_bench import plans
from vllm_bench.agreement import compare, judge

SETTINGS = settings(deadline=None, max_examples=15)


def _rows(tokens: list[int], tops: list[dict[int, float]]) -> list[dict]:
    return [{"tokens": tokens, "top": tops}]


def _engine(logits: np.ndarray, noise: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """What an engine finds that adds noise to logits [rows, places, tokens] and rounds them to steps of 1/8, as
    bfloat16 does from 16 to 32. Rows that part go on as they would have: no place after that is compared."""
    found = np.round((logits + rng.normal(0, noise, logits.shape)) * 8) / 8
    likely = found - np.log(np.exp(found).sum(-1, keepdims=True))
    return [{"tokens": row.argmax(-1).tolist(), "top": [dict(enumerate(place)) for place in row.tolist()]}
            for row in likely]


def _three(seed: int) -> tuple[list[list[dict[str, Any]]], np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    logits = 20 + 2 * rng.standard_normal((13, 24, 8))
    return [_engine(logits, 0.06, rng) for _ in range(3)], logits, rng


def test_tokens_part_by_what_both_engines_see() -> None:
    tops = [{1: -0.1, 2: -3.0}, {5: -0.70, 6: -0.71}, {9: 0.0}]
    theirs = _rows([1, 5, 9], tops)
    same = compare(_rows([1, 5, 9], [{1: -0.15}, *tops[1:]]), theirs)
    assert (same.compared, same.parted) == (3, ()) and same.largest_difference == pytest.approx(0.05)
    tie = compare(_rows([1, 6, 7], [tops[0], {5: -0.72, 6: -0.70}, tops[2]]), theirs)
    assert tie.compared == 1 and tie.parted == ((0, 1, pytest.approx(0.03)),) and tie.largest_swing == tie.parted[0][2]
    assert judge(tie, None).whether and not judge(tie, None, tie=0.01).whether
    assert judge(tie, None, tie=None).whether is None
    assert not judge(compare(_rows([2, 5, 9], tops), theirs), None, tie=1.0).whether
    unlikely = compare(_rows([4, 5, 9], [{4: -0.1, 1: -0.1}, *tops[1:]]), theirs)
    assert unlikely.parted == ((0, 0, None),) and not judge(unlikely, None, tie=99).whether
    assert "an unlikely token" in str(unlikely)
    back = json.loads(json.dumps(theirs))  # whose keys are text
    assert compare(theirs, back) == compare(back, theirs) == compare(theirs, theirs)


def test_any_of_three_engines_that_round_alike_is_within_what_the_others_differ_by() -> None:
    verdicts = []
    for seed in range(8):
        engines, _, _ = _three(seed)
        for own, peer, other in itertools.permutations(engines, 3):
            verdicts.append(judge(compare(own, other), compare(peer, other)))
    wrong = [str(verdict) for verdict in verdicts if not verdict.whether]
    assert len(wrong) <= 0.1 * len(verdicts), wrong  # two standard errors: some 5 % pass them by chance


@SETTINGS
@given(st.integers(0, 999))
def test_an_engine_that_is_the_peer_or_the_other_is_within(seed) -> None:
    (other, peer, _), _, _ = _three(seed)
    peers = compare(peer, other)
    assert judge(peers, peers).whether and judge(compare(other, other), peers).whether


@SETTINGS
@given(st.integers(0, 999), st.integers(0, 12), st.sampled_from((1.0, 2.0, 5.0)))
def test_one_row_that_parts_at_a_gap_is_caught(seed, row, gap) -> None:
    (other, peer, _), _, _ = _three(seed)
    first = other[row]["top"][0]
    token, runner_up = sorted(first, key=first.__getitem__)[:-3:-1]
    for one in (other, peer):
        one[row]["top"][0] = first | {runner_up: first[token] - gap}
        one[row]["tokens"][0] = token
    own = copy.deepcopy(peer)
    own[row]["tokens"][0] = runner_up
    verdict = judge(compare(own, other), compare(peer, other))
    assert verdict.whether is False and str(verdict).startswith("NOT within: 1 of ")


@SETTINGS
@given(st.integers(0, 999), st.sampled_from((0.5, -0.5, 3.0)), st.one_of(st.none(), st.integers(0, 12)))
def test_log_probabilities_that_are_off_are_caught_though_tokens_agree(seed, off, only) -> None:
    (other, peer, _), _, _ = _three(seed)
    own = copy.deepcopy(other)
    for row in own if only is None else [own[only]]:
        row["top"] = [{token: value + off for token, value in place.items()} for place in row["top"]]
    assert judge(compare(own, other), compare(peer, other)).whether is False


@SETTINGS
@given(st.integers(0, 999))
def test_a_kernel_four_times_as_noisy_is_caught(seed) -> None:
    (other, peer, _), logits, rng = _three(seed)
    assert judge(compare(_engine(logits, 0.24, rng), other), compare(peer, other)).whether is False


def test_nothing_is_judged_by_peers_that_share_no_token() -> None:
    apart = compare(_rows([1], [{1: -0.1, 2: -0.2}]), _rows([2], [{1: -0.2, 2: -0.1}]))
    assert not apart.compared and judge(apart, apart, tie=None).whether is None
    (other, peer, _), _, _ = _three(0)
    assert not judge(apart, compare(peer, other)).whether  # ours neither


def test_ours_is_judged_by_a_peer_with_the_same_type_of_cache(tmp_path) -> None:
    names = {job.name.removeprefix("tokens ") for job in plans.checks("m", tmp_path, 0.0, vllm_append=True)}
    judged = {pair.own: pair.peer for pair in plans.comparisons(names) if pair.peer}
    assert judged == {name: name.replace("CUSTOM", "TRITON_ATTN").removesuffix(" vLLM's append")
                      for name in names if name.startswith("CUSTOM")}
    for kind in plans.EIGHT_BIT:
        names = [job.name.removeprefix("tokens ") for job in plans.checks("m", tmp_path, 0.0, (kind,))]
        assert [pair.own for pair in plans.comparisons(names) if pair.peer] == [f"CUSTOM {kind}"]
