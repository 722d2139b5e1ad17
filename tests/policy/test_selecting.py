"""Whether steps select pages, by price: never slower than dense, and as their parts say."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

from pkvsim import DecodeShape
from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import DEVICES, get_device
from pkvsim.options import AttentionOptions
from pkvsim.policy.selecting import LEAST_GAIN, selection_prices
from pkvsim.pricing.selected import SELECT_CTAS, list_rule, listed_tokens, selected_step_time
from pkvsim.schedule.page_lists import list_shape
from pkvsim.selection.rules import Budget, Pins
from pkvsim.selection.setup import SelectionSetup, parse_selection, summary_bytes
from pkvsim.timeline.timeline import makespan_us

SHAPE = DecodeShape(32, 8, 128, 16)
LENS = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 140_000)), min_size=1, max_size=40)
FORMS = [("mean_std", None), ("mean_std", "uint8"), ("quest", None), ("quest", "uint8"), ("centroids", None)]
SETUPS = st.builds(
    lambda form, *rest: SelectionSetup(form[0], *rest, summary_dtype=form[1]), st.sampled_from(FORMS),
    st.builds(Budget, st.floats(0.01, 1), st.integers(0, 40)),
    st.builds(Pins, st.integers(0, 3), st.integers(0, 3)), st.integers(1, 4), st.integers(0, 2),
)  # fmt: skip


@given(lens=LENS, setup=SETUPS, device=st.sampled_from(sorted(DEVICES)))
@settings(deadline=None, max_examples=60)
def test_what_is_taken_is_never_priced_slower_than_dense(lens, setup, device) -> None:
    layer = selection_prices(SHAPE, DEVICES[device], setup).of(np.array(lens, np.int32))
    assert layer.taken_us <= 1.02 * layer.dense_us
    assert layer.pays == (layer.selected_us <= (1 - LEAST_GAIN) * layer.dense_us)
    assert layer.selected_us == pytest.approx(sum(layer.selected)) and min(layer.selected) >= 0


@given(lens=LENS, setup=SETUPS)
@settings(deadline=None, max_examples=60)
def test_lists_are_as_long_as_the_budget_says_and_longer_rows_have_no_shorter_ones(lens, setup) -> None:
    ordered = np.array(sorted(lens, reverse=True), np.int64)
    found = listed_tokens(ordered, 16, list_rule(setup))
    for length, tokens in zip(ordered.tolist(), found.tolist()):
        assert tokens == min(length, 16 * setup.budget.pages(-(-length // 16), setup.pins))
    assert (np.diff(found) <= 0).all()


@given(lens=st.lists(st.integers(1, 140_000), min_size=1, max_size=200), more=st.integers(1, 140_000), data=st.data(),
       device=st.sampled_from(sorted(DEVICES)), form=st.sampled_from(FORMS))  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_selecting_longer_or_more_rows_is_priced_no_lower(lens, more, data, device, form) -> None:
    prices = selection_prices(SHAPE, DEVICES[device], SelectionSetup(form[0], summary_dtype=form[1]))
    at = data.draw(st.integers(0, len(lens) - 1))
    select_us = prices.of(lens).selected.select
    assert prices.of([*lens, more]).selected.select >= select_us
    assert prices.of([*lens[:at], lens[at] + more, *lens[at + 1 :]]).selected.select >= select_us


@given(lens=st.lists(st.integers(1, 140_000), min_size=1, max_size=200), setup=SETUPS, device=st.sampled_from(sorted(DEVICES)))
@settings(deadline=None, max_examples=60)
def test_keeping_and_selecting_cost_what_their_constants_say(lens, setup, device) -> None:
    """A launch that scores all summaries, its gap and its work shared out over the layers that read its lists."""
    gpu, heads = DEVICES[device], SHAPE.num_kv_heads
    prices = selection_prices(SHAPE, gpu, setup)
    found, one = prices.of(lens).selected, prices.prices
    coded = setup.summary_dtype is not None or setup.method == "centroids"
    assert found.keep == pytest.approx(one.keep_us + one.keep_list_us * len(lens) * heads + one.keep_coded_us * coded)
    pages = [-(-length // 16) for length in lens]
    scored_gb_s = device_routes(gpu)["balanced"].bandwidth_gb_s * (one.coded_share if coded else one.score_share)
    launch_us = one.select_us + sum(pages) * summary_bytes(SHAPE, setup) / (scored_gb_s * 1e3)
    launch_us += one.page_us * max(pages) + one.list_us * (-(-len(lens) * heads // (SELECT_CTAS * gpu.num_sms)) - 1)
    assert found.select == pytest.approx((launch_us + one.gap_us) / setup.every)


@given(layer_us=st.floats(0, 50), issue_us=st.floats(0, 20), layers=st.integers(1, 80), rows=st.integers(0, 300))
def test_a_step_that_selects_is_issued_once_and_then_layer_by_layer(layer_us, issue_us, layers, rows) -> None:
    model = get_device("h200").routes["balanced"]
    once_us = model.isolated_us + model.plan_us + rows * model.plan_row_us + model.host_us + issue_us
    further_us = (layers - 1) * max(layer_us, model.run_us + issue_us)
    gpu_us, host_us = selected_step_time(model.to_row(), rows, layers, layer_us, issue_us)
    assert gpu_us == pytest.approx(model.isolated_us + layers * layer_us)
    assert gpu_us + host_us == pytest.approx(once_us + layer_us + further_us)


def test_every_wave_of_lists_after_the_first_has_its_price() -> None:
    device = get_device("h200")
    prices = selection_prices(SHAPE, device, SelectionSetup())
    rows = 2 * device.num_sms // SHAPE.num_kv_heads  # of a wave: 33 of 8 lists on 132 SMs
    assert rows * SHAPE.num_kv_heads == 2 * device.num_sms
    counts = np.array([1, rows, rows + 1, 2 * rows, 2 * rows + 1])
    us = np.array([prices.of([1] * count).selected.select for count in counts])
    row_us = (us[1] - us[0]) / (rows - 1)  # of a row's summaries
    waves = us - us[0] - row_us * (counts - 1)
    np.testing.assert_allclose(waves, prices.prices.list_us * np.array([0, 0, 1, 1, 2]), atol=1e-9)


def test_short_steps_go_dense_and_long_ones_select() -> None:
    prices = selection_prices(SHAPE, get_device("h200"), SelectionSetup())
    assert not prices.of([4096]).pays
    assert all(prices.of([length] * rows).pays for rows, length in ((64, 32768), (8, 32768), (1, 131072)))
    for rows in (1, 8, 64):
        least = prices.least_tokens(rows)
        assert prices.of([least] * rows).pays and not prices.of([least - 16] * rows).pays
    assert prices.least_tokens(1) > 4096 and prices.least_tokens(1, most=4096) is None
    everything = selection_prices(SHAPE, get_device("h200"), SelectionSetup(budget=Budget(1.0)))
    assert everything.least_tokens(8, most=1 << 20) is None  # all pages and their scores cost more than all pages


@given(lens=LENS, setup=SETUPS.filter(lambda setup: setup.method != "centroids"))
@settings(deadline=None, max_examples=40)
def test_summaries_in_8_bits_change_the_price_of_selecting_and_keeping_alone(lens, setup) -> None:
    plain, coded = (selection_prices(SHAPE, get_device("h200"), replace(setup, summary_dtype=dtype)).of(lens)
                    for dtype in (None, "uint8"))  # fmt: skip
    assert (coded.dense_us, coded.selected.attend) == (plain.dense_us, plain.selected.attend)
    assert coded.selected.select <= plain.selected.select and coded.selected.keep > plain.selected.keep


def test_attention_over_lists_is_priced_as_its_schedule_runs() -> None:
    device, setup = get_device("h200"), SelectionSetup()
    prices, model = selection_prices(SHAPE, device, setup), device.routes["balanced"]
    for lens in ([32768] * 64, [131072], [65536, 8192, 8192, 1000], [20000, 3000] * 8):
        lists = np.repeat(prices.lists(lens), SHAPE.num_kv_heads)
        tasks_us = makespan_us(model, list_shape(SHAPE), lists, num_sms=device.num_sms)
        attend = prices.prices.attend_us + tasks_us / prices.prices.attend_share
        assert prices.of(lens).selected.attend == pytest.approx(attend, rel=0.05)


@pytest.mark.parametrize(("options", "words"), [
    ({"window": 4096}, "window: expected None"), ({"query_tokens": 2}, "query_tokens: expected 1"),
    ({"kv_dtype": "int8"}, "kv_dtype: expected 16 bits"), ({"v_head_dim": 64}, "v_head_dim: expected that of K"),
])  # fmt: skip
def test_what_no_kernel_selects_is_refused_by_name(options, words) -> None:
    with pytest.raises(ValueError, match=f"select: {words}"):
        selection_prices(SHAPE, get_device("h200"), SelectionSetup(), options=AttentionOptions(**options))
    for shape in (DecodeShape(8, 8, 96, 16), DecodeShape(128, 4, 128, 16)):
        with pytest.raises(ValueError, match="select: (head_dim|group_size): expected"):
            selection_prices(shape, get_device("h200"), SelectionSetup())


def test_the_words_of_the_commands() -> None:
    found = parse_selection("quest:0.05", every=3)
    assert (found.method, found.budget.fraction, found.every, found.words) == ("quest", 0.05, 3, "quest:0.05")
    assert parse_selection("off") is None and summary_bytes(SHAPE, found) * 16 == 2 * 8 * 16 * 128 * 2
    coded = parse_selection("quest:0.05:8bit", every=3)
    assert coded == replace(found, summary_dtype="uint8") and parse_selection(coded.words, every=3) == coded
    assert summary_bytes(SHAPE, coded) == 8 * 2 * (128 + 4)
    parts = parse_selection("centroids:0.05")
    assert parts.words == "centroids:0.05" and summary_bytes(SHAPE, parts) == 8 * 8 * (128 // 2 + 4)
    with pytest.raises(ValueError, match="select: expected METHOD:BUDGET of centroids"):
        parse_selection("centroids:0.05:8bit")
    for words in ("mean_std", "mean_std:", "mean_std:two", "mean_std:0", "mean_std:1.5", "mean_std:nan", "h2o:0.1", "",
                  "mean_std:0.1:", "mean_std:0.1:16bit", "mean_std::8bit"):
        with pytest.raises(ValueError, match="select: "):
            parse_selection(words)
    with pytest.raises(ValueError, match="summary_dtype: expected None or 'uint8', got 'int8'"):
        SelectionSetup(summary_dtype="int8")
    with pytest.raises(ValueError, match="^budget: expected Budget, got 0.1"):
        SelectionSetup(budget=0.1)
    with pytest.raises(ValueError, match="^pins: expected Pins"):
        SelectionSetup(pins=(1, 2))
    with pytest.raises(ValueError, match="select_every: "):
        parse_selection("quest:0.1", every=0)


def test_the_price_and_the_kernel_agree_on_ctas_of_an_sm() -> None:
    (line,) = [one for one in (ROOT / "cuda_src/select.cu").read_text().splitlines() if "constexpr int SELECT_CTAS" in one]
    assert line.endswith(f"? {SELECT_CTAS} : 1;")
