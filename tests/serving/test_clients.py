"""When requests are sent: after what they follow, and never more at once than there are clients."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import DEVICE, MODEL, crowded, kv_gib, make_trace, waits

from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.serving.state import SERVED
from pkvsim.traces.requests import closed_loop


@settings(max_examples=40, deadline=None)
@given(crowded(), st.data())
def test_who_follows_waits_and_no_more_are_in_flight_than_may_be(case, data) -> None:
    trace, config = case
    trace = data.draw(waits(trace))
    requests = simulate(trace, MODEL, DEVICE, "balanced", config).requests
    sent, served = requests.arrival_s, requests.rejected == SERVED
    assert not np.isnan(sent).any() and not np.isnan(requests.finish_s[served]).any()
    ends = np.where(served, requests.finish_s, sent)  # what is refused ends as it is sent
    due = trace.arrival_s - trace.arrival_s[0]
    if trace.after is not None:
        follows = trace.after >= 0
        due[follows] = np.maximum(due, ends[trace.after] + trace.think_us / 1e6)[follows]
    assert (sent >= due - 1e-9).all()
    if trace.concurrency is None:
        np.testing.assert_allclose(sent, due, rtol=1e-12, atol=1e-9)
        return
    for at in sent[served]:
        assert ((sent[served] <= at) & (ends[served] > at)).sum() <= trace.concurrency
    late = served & (sent > due + 1e-6)  # these waited for a slot, so they were sent as one became free
    assert np.isin(np.round(sent[late], 9), np.round(ends, 9)).all()


def test_a_closed_loop_keeps_its_clients_busy() -> None:
    trace = closed_loop(make_trace([(0.5, 200, 20)] * 40), 4)
    result = simulate(trace, MODEL, DEVICE, "balanced", ServingConfig())
    assert set(result.steps.rows[:-1]) == {4} and not result.requests.queue_s.any()
    alone = simulate(replace(trace, concurrency=1), MODEL, DEVICE, "balanced", ServingConfig())
    np.testing.assert_allclose(alone.requests.arrival_s[1:], alone.requests.finish_s[:-1])
    assert not alone.summary["saturated"]


def test_a_request_after_one_that_is_refused_is_sent_all_the_same() -> None:
    trace = replace(
        make_trace([(0, 100, 4), (1, 5000, 4), (1, 100, 4)]), after=np.array([-1, 0, 1]), think_us=np.full(3, 3e6)
    )
    requests = simulate(trace, MODEL, DEVICE, "balanced", ServingConfig(kv_gib=kv_gib(30))).requests
    assert (requests.rejected == SERVED).tolist() == [True, False, True]
    assert requests.arrival_s[2] == pytest.approx(requests.arrival_s[1] + 3) == pytest.approx(requests.finish_s[0] + 6)
