"""An engine's own costs of the balanced schedule are what it is priced with, by the closed form and by the timeline."""
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim import AttentionOptions, DecodeShape, make_schedule
from pkvsim.devices.derive import balanced_costs, device_routes
from pkvsim.devices.device import DEVICES, get_device, load_device
from pkvsim.policy.by_name import CalibratedPolicy
from pkvsim.schedule.costs import BalancedCosts, default_costs
from pkvsim.timeline.timeline import route_schedule

H200 = get_device("h200")


def with_costs(costs):
    entry = H200.calibration["balanced"]
    model = replace(entry.model, costs=costs)
    return replace(H200, calibration=H200.calibration | {"balanced": replace(entry, model=model)})


def balanced_us(device, shape, lens, options=AttentionOptions()):
    return CalibratedPolicy().decide(shape, np.array(lens, np.int32), device, options=options).layer_us["balanced"]


@settings(max_examples=60, deadline=None)
@given(
    lens=st.lists(st.integers(1, 20000), min_size=1, max_size=12),
    costs=st.builds(BalancedCosts, st.integers(0, 40), st.integers(1, 100), st.integers(0, 20), st.integers(0, 200)),
    page_size=st.sampled_from([1, 16]),
)
def test_the_schedule_that_is_priced_is_the_engines(lens, costs, page_size):
    shape, lens = DecodeShape(32, 8, 128, page_size), np.array(lens, np.int32)
    model = replace(H200.routes["balanced"], costs=costs)
    kernel = costs.of_kernel(columns=4, v_head_dim=128, kv_element_bytes=2, page_size=page_size)
    assert page_size > 1 or kernel.pair == 0
    priced = route_schedule(model, shape, lens, num_sms=132)
    engine = make_schedule("balanced", shape, lens, tile_tokens=16, num_ctas=132, costs=kernel)
    assert (priced.tasks == engine.tasks).all() and (priced.cta_offsets == engine.cta_offsets).all()


def test_other_costs_are_other_prices():
    shape, lens = DecodeShape(32, 8, 128, 16), [600] * 4
    own = balanced_us(H200, shape, lens)
    assert own != balanced_us(with_costs(BalancedCosts(7, 200, 2, 0)), shape, lens)
    # 32 heads in 66 ranges of a pair each, or in 132.
    assert own != balanced_us(with_costs(BalancedCosts(7, 8, 0, 0)), shape, lens)
    unpaired = with_costs(H200.routes["balanced"].costs._replace(pair=0))
    pages_of_one = DecodeShape(32, 8, 128, 1)
    assert balanced_us(H200, pages_of_one, lens) == balanced_us(unpaired, pages_of_one, lens)


@pytest.mark.parametrize("name", DEVICES)
def test_a_gpu_weighs_what_its_engine_takes(name):
    device = get_device(name)
    assert balanced_costs(device) == device_routes(device)["balanced"].costs == default_costs(device.compute_capability)


def test_device_files_say_the_costs_or_leave_them(tmp_path):
    def read(change):
        data = json.loads(with_costs(BalancedCosts(1, 2, 3, 4)).to_json())
        change(data["routes"]["balanced"]["model"])
        path = tmp_path / "gpu.json"
        path.write_text(json.dumps(data))
        return load_device(path).routes["balanced"].costs

    assert read(lambda model: None) == (1, 2, 3, 4)
    assert read(lambda model: model.pop("costs")) == default_costs(H200.compute_capability)
    assert read(lambda model: model["costs"].pop("minimum")) == (1, 8, 3, 4)

    def as_before(model):  # one number on every route, as files had it
        model.pop("costs")
        model["pair" + "_cost"] = 40.0

    assert read(as_before) == default_costs(H200.compute_capability)._replace(pair=40)
    with pytest.raises(ValueError, match=r"routes.balanced.model.costs.minimum: expected an integer in \[1, "):
        read(lambda model: model["costs"].update(minimum=0))
    with pytest.raises(ValueError, match="costs: expected an object of segment, minimum, part, pair"):
        read(lambda model: model["costs"].update(pear=1))
