"""The scheduler by itself, as a real serving loop drives it."""
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from serving_cases import DEVICE, MODEL, crowded, make_trace

from pkvsim.serving.scheduler import Scheduler
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import limits_of, requests_of, simulate
from pkvsim.serving.state import DECODING, FINISHED, SERVED, WAITING


def scheduler_of(trace, config) -> Scheduler:
    limits = limits_of(MODEL, DEVICE, config)
    return Scheduler(requests_of(trace, MODEL, config, limits), limits)


@settings(max_examples=40, deadline=None)
@given(crowded())
def test_its_steps_are_the_simulators(case) -> None:
    """Driven step by step with the simulator's own step times, it runs the same rows and ends at the same times."""
    trace, config = case
    result = simulate(trace, MODEL, DEVICE, "balanced", config)
    scheduler, steps, now_us = scheduler_of(trace, config), result.steps, 0.0
    tokens = np.zeros(len(trace), np.int64)
    for at in range(len(steps.steps)):
        ready_us = scheduler.next_work_us(now_us)
        now_us = max(now_us, steps.start_s[at] * 1e6)
        assert ready_us <= now_us + 1e-3
        work = scheduler.next_step(now_us)
        assert len(work.decode) == steps.decode_rows[at] and work.prefill_tokens.sum() == steps.prefill_tokens[at]
        assert work.tokens <= config.step_tokens and not set(work.decode) & set(work.prefill)
        assert (np.diff(work.decode_lens) <= 0).all() and set(work.admitted) <= set(work.prefill)
        assert (scheduler.state.phase[work.decode] == DECODING).all()
        tokens[work.decode] += 1
        now_us += steps.duration_us[at]
        finished = scheduler.end_step(now_us)
        assert (scheduler.state.phase[finished] == FINISHED).all()
    assert scheduler.next_work_us(now_us) == math.inf
    served = result.requests.rejected == SERVED
    assert (scheduler.state.phase == np.where(served, FINISHED, WAITING)).all()
    np.testing.assert_array_equal(scheduler.state.generated[served], trace.output_tokens[served])
    np.testing.assert_allclose(scheduler.state.finish_us[served] / 1e6, result.requests.finish_s[served], rtol=1e-9)


def test_a_stopped_request_ends_before_its_trace_says() -> None:
    trace = make_trace([(0, 10, 50), (0, 10, 3)])
    scheduler = scheduler_of(trace, ServingConfig(prefix_cache="none"))
    with pytest.raises(RuntimeError, match="end_step: call next_step"):
        scheduler.end_step(0.0)
    first = scheduler.next_step(0.0)
    assert first.prefill.tolist() == first.admitted.tolist() == [0, 1] and not len(first.decode)
    with pytest.raises(RuntimeError, match="next_step: call end_step"):
        scheduler.next_step(1.0)
    assert not len(scheduler.end_step(1.0))
    assert scheduler.next_step(1.0).decode_lens.tolist() == [11, 11]
    assert scheduler.end_step(2.0, stopped=[0]).tolist() == [0]
    assert scheduler.next_step(2.0).decode.tolist() == [1]
    assert trace.output_tokens.tolist() == [50, 3]  # the trace is as it was
