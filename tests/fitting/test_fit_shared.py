"""The prices of shared reads: against what was measured, and found again by a fit."""
from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
from bench.shared_cells import CELLS, measured_of  # noqa: E402

from pkvsim.devices.device import get_device  # noqa: E402
from pkvsim.fitting import fit_shared  # noqa: E402
from pkvsim.fitting.fit_shared import MOST, MeasuredShared, _Measured, errors, fit  # noqa: E402
from pkvsim.pricing.shared import PRICES, WARPGROUP_PRICES, SharedPrices, apart_gb_s  # noqa: E402
from pkvsim.schedule.groups import PrefixGroups  # noqa: E402
from pkvsim.schedule.prefixes import sharing_rule  # noqa: E402
from pkvsim.timeline.shared import simulate_shared  # noqa: E402

H200 = get_device("h200")
RESULTS = ("h200_shared.json", "h200_shared_steps.json", "h200_shared_drawn.json", "h200_shared_plans.json")
# Measured after the fit, of kernels with another plan.
UNSEEN = ("h200_shared_cells.json", "h200_shared_costs.json", "h200_shared_cell_costs.json")


def test_the_prices_of_reads_by_warpgroups_are_within_five_percent_of_the_measured_steps():
    """Those of steps that are read together unless told: the figures that pkvsim.pricing.shared states."""
    worth = measured_worth()
    assert len(worth) > 60 and len({step.costs for step in worth}) > 4
    found = np.abs(errors(worth, H200, None))
    assert found.mean() < 0.05 and found.max() < 0.2


def test_they_are_within_five_percent_of_steps_that_no_fit_has_seen():
    unseen = measured_worth(UNSEEN)
    assert len(unseen) > 100 and len({step.costs for step in unseen}) > 5
    assert np.abs(errors(unseen, H200, None)).mean() < 0.05


def measured_worth(names=RESULTS):
    """Of results on an H200, the steps that save enough to be read together."""
    steps = [step for name in names for step in measured_of(json.loads((EXAMPLES / "results" / name).read_text()))]
    bandwidth = H200.routes["balanced"].bandwidth_gb_s
    return [step for step in steps
            if sharing_rule(step.shape, bandwidth_gb_per_s=bandwidth).worth(step.saved_tokens())]


def test_the_shipped_prices_are_those_of_least_error():
    """A change of one constant by a fiftieth gains nothing worth speaking of, so that a fit comes back to these."""
    steps = _Measured(measured_worth(), H200)

    def mean(prices):
        return np.abs(steps.errors(prices)).mean()

    least = mean(WARPGROUP_PRICES)
    for name in SharedPrices._fields:
        for factor in (0.98, 1.02):
            value = min(getattr(MOST, name), factor * getattr(WARPGROUP_PRICES, name))
            assert mean(WARPGROUP_PRICES._replace(**{name: value})) > least - 5e-4, (name, factor)


def test_a_fit_holds_the_largest_error_where_the_mean_alone_would_not(monkeypatch):
    """Steps with one that no constants price: its error is held to the bound, and the others' pay for it."""
    true = SharedPrices(efficiency=0.6, weights=200.0, start=12.0, read=1.5, row=0.6, state=0.2, share=0.5)
    steps = [MeasuredShared(cell.name, cell.shape, cell.lengths(), cell.prefix_groups(), 1.0)
             for cell in CELLS[:5]]
    us = 1 + errors(steps, H200, true)
    us[0] *= 0.75
    steps = [replace(step, us=float(one)) for step, one in zip(steps, us)]
    monkeypatch.setattr(fit_shared, "STARTS", (true,))
    monkeypatch.setattr(fit_shared, "MOST_STEPS", (15, 150))
    found = np.abs(errors(steps, H200, fit(steps, H200)))
    assert found.max() < fit_shared.MOST_ERROR + 0.01
    bound = fit_shared.MOST_ERROR
    monkeypatch.setattr(fit_shared, "MOST_ERROR", 1.0)
    free = np.abs(errors(steps, H200, fit(steps, H200)))
    assert free.max() > bound and free.mean() < found.mean()


def test_the_prices_of_reads_by_warps_are_within_five_percent_of_the_measured_steps(monkeypatch):
    monkeypatch.setattr("pkvsim.pricing.shared.by_warpgroups", lambda *asked: False)
    steps = measured_of(json.loads(Path(__file__).with_name("h200_shared_by_warps.json").read_text()))
    assert len(steps) == len(CELLS)
    found = {step.name: error for step, error in zip(steps, errors(steps, H200, PRICES))}
    wide = np.array([found[step.name] for step in steps if step.shape.head_dim == 128])
    assert np.abs(wide).mean() < 0.05 and np.abs(wide).max() < 0.1


def test_a_fit_finds_what_steps_were_priced_with(monkeypatch):
    true = SharedPrices(efficiency=0.18, weights=30.0, start=12.0, read=1.5, row=0.6, state=0.2, share=0.7)
    steps = [MeasuredShared(cell.name, cell.shape, cell.lengths(), cell.prefix_groups(), 1.0)
             for cell in CELLS[:5]]
    steps = [MeasuredShared(step.name, step.shape, step.seq_lens, step.groups, us) for step, us in
             zip(steps, 1 + errors(steps, H200, true))]
    monkeypatch.setattr(fit_shared, "STARTS", fit_shared.STARTS[:1])
    assert np.abs(errors(steps, H200, fit(steps, H200))).mean() < 0.02


def test_a_step_in_which_nobody_shares_is_refused():
    cell = CELLS[4]
    alone = PrefixGroups(np.arange(cell.rows, dtype=np.int32), [4] * cell.rows)
    with pytest.raises(ValueError, match="^measured: expected steps whose rows read together"):
        errors([MeasuredShared("alone", cell.shape, cell.lengths(), alone, 1.0)], H200, PRICES)
    assert simulate_shared(H200.routes["balanced"], cell.shape, cell.lengths(), alone, H200) is None


def test_reading_apart_is_faster_the_more_is_read_again():
    assert apart_gb_s(4000.0, 100.0, 100.0) == 4000.0 and apart_gb_s(4000.0, 0.0, 0.0) == 4000.0
    speeds = [apart_gb_s(4000.0, 100.0, distinct) for distinct in (100.0, 60.0, 20.0, 1.0)]
    assert speeds == sorted(speeds) and speeds[-1] < 2 * 4000.0
