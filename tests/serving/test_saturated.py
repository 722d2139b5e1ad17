"""When a run is called saturated: requests wait, and the servers have hardly any time to spare."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import DEVICE, MODEL, crowded, make_trace

from pkvsim.serving.results.summary import SATURATED_SHARE, half_wait_longer, work_share
from pkvsim.serving.simulate import simulate
from pkvsim.studies.whatif import whatif
from pkvsim.traces.requests import RequestTrace


def bursts(every_s: float, count: int = 12) -> RequestTrace:
    """Thirty requests at once, which take an H200 about three seconds, again and again."""
    return make_trace([(every_s if at % 30 == 0 and at else 0.0, 4000, 20) for at in range(30 * count)])


def test_bursts_that_are_worked_off_are_no_saturation() -> None:
    """However long half of the requests wait in them; whatif says that these do."""
    note = "not saturated, as there is time to spare between bursts"
    for every_s, saturated in ((60.0, False), (10.0, False), (1.0, True)):
        report = whatif(bursts(every_s), MODEL, DEVICE, ["balanced"])
        run = report.results["balanced"]
        assert half_wait_longer(run.requests) and run.summary["saturated"] == saturated
        assert any(told.startswith(note) for told in report.notes) != saturated
        assert any(told.startswith("saturated") for told in report.notes) == saturated


@settings(max_examples=60, deadline=None)
@given(crowded(), st.integers(1, 3))
def test_the_share_of_time_with_work_is_that_of_the_steps(case, replicas) -> None:
    """Of one server; of several each counts by its requests."""
    trace, config = case
    run = simulate(trace, MODEL, DEVICE, "balanced", replace(config, replicas=replicas))
    share = work_share(run.requests)
    assert 0 < share <= 1 + 1e-12
    if replicas == 1:
        assert share == pytest.approx(run.summary["busy_share"], rel=1e-9)
    assert not (run.summary["saturated"] and share < SATURATED_SHARE and np.ptp(trace.arrival_s) > 0)
