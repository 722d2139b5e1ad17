"""What counts as held out was never fitted to: fits are replaced by notes of what they were given."""
from __future__ import annotations

import numpy as np
import pytest

from pkvsim.devices.device import get_device
from pkvsim.fitting import fit_routes, fit_shared
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.shapes import DecodeShape

SHAPE = DecodeShape(32, 8, 128, 16)


@pytest.mark.parametrize("count", [8, 9])
def test_a_routes_halves_are_all_of_it_and_share_nothing(count, monkeypatch) -> None:
    fitted, tested = [], []

    def fit_route(measurements, *_, **__):
        fitted.append(set(measurements))

    def percent(model, measurements, num_sms):
        tested.append(set(measurements))
        return np.zeros(len(measurements))

    monkeypatch.setattr(fit_routes, "fit_route", fit_route)
    monkeypatch.setattr(fit_routes, "_percent", percent)
    fit_routes.held_out_error(list(range(count)), [], (), num_sms=1)
    assert len(fitted) == fit_routes.HALVES == len(tested) and len(set(map(frozenset, fitted))) > 1
    for train, test in zip(fitted, tested):
        assert not train & test and train | test == set(range(count)) and len(train) == count // 2


def shared(name: str, us: float) -> fit_shared.MeasuredShared:
    groups = PrefixGroups(np.array([0, 0, -1, 1], np.int32), np.array([4, 9], np.int32))
    return fit_shared.MeasuredShared(name, SHAPE, np.full(4, 400, np.int32), groups, us)


def test_a_shared_step_is_in_one_half_however_often_it_was_measured(monkeypatch) -> None:
    measured = [shared(name, us) for name in "abcde" for us in (1.0, 2.0)]
    monkeypatch.setattr(fit_shared, "fit", lambda steps, device: frozenset(step.name for step in steps))
    seen = []

    def errors(steps, device, fitted):
        seen.append((fitted, frozenset(step.name for step in steps)))
        return np.zeros(len(steps))

    monkeypatch.setattr(fit_shared, "errors", errors)
    fit_shared.fit_shared(measured, get_device("h200"))
    (one, other), (again, back), (every, all_) = seen
    assert one == back and other == again and not one & other and one | other == frozenset("abcde") == every == all_


def test_a_group_saves_what_all_but_one_of_its_members_would_read() -> None:
    assert shared("a", 1.0).saved_tokens() == 4 * 16  # two rows of four pages; the other group is of one row
