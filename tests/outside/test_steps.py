"""Whole steps: bounds, engines' habits, and a real server's step times."""
import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SHARED

from pkvsim.devices.device import DEVICES, get_device
from pkvsim.fitting.fit_step_tables import fit_step_tables, price_steps, read_steps
from pkvsim.models.presets import get_model
from pkvsim.outside.derive import outside_entry
from pkvsim.outside.engine_profile import PROFILES, EngineProfile, get_profile
from pkvsim.outside.flash_decode import flash_decode_us
from pkvsim.outside.step import StepWork, step_time
from pkvsim.outside.step_costs import DRAFTS, PARTS, heated, step_costs

SERVING = SHARED / "reference" / "serving"
LLAMA, H200, VLLM = get_model("llama-3.1-8b"), get_device("h200"), get_profile("vllm")
# Of h200_vllm_decode_steps.csv and h200_vllm_prefill_steps.csv, measured by this project on one NVIDIA H200 with vLLM
# 0.24.0: (rows, context, begin, chunk, ms).
MEASURED = (
    (1, 1152, 0, 0, 4.905), (8, 1153, 0, 0, 5.273), (32, 1153, 0, 0, 6.392), (128, 1153, 0, 0, 10.94),
    (8, 8432, 0, 0, 7.011), (9, 8430, 0, 0, 8.283), (16, 8416, 0, 0, 9.095), (17, 8414, 0, 0, 11.426),
    (32, 8320, 0, 0, 13.253), (5, 32856, 0, 0, 10.034), (6, 32848, 0, 0, 13.146), (1, 120032, 0, 0, 8.598),
    (0, 0, 8192, 2048, 63.4), (0, 0, 32768, 2048, 104.5), (0, 0, 65536, 2048, 162.8), (0, 0, 116736, 2048, 256.9),
    (8, 32826, 7339, 2040, 72.85), (31, 1032, 798, 226, 11.06),
)  # fmt: skip


def price(rows=(), chunks=(), model=LLAMA, device=H200, profile=VLLM, **options):
    return step_time(model, device, StepWork(decode_lens=tuple(rows), chunks=tuple(chunks)), profile, **options)


def test_the_steps_of_a_real_server():
    off = [
        price([context] * rows, [(begin, chunk)] if chunk else []).us / 1e3 / ms - 1
        for rows, context, begin, chunk, ms in MEASURED
    ]
    assert np.abs(off).mean() < 0.04 and np.abs(off).max() < 0.12


@pytest.mark.skipif(not SERVING.exists(), reason="needs the measured serving runs")
def test_all_steps_of_a_real_server_within_4_percent():
    constants = outside_entry(H200, "vllm").constants
    for table in ("decode", "prefill"):
        steps = read_steps(SERVING / f"h200_vllm_{table}_steps.csv", run="main")
        off = price_steps(steps, LLAMA, H200, constants, VLLM) / [step.us for step in steps] - 1
        assert np.abs(off).mean() < 0.04


def test_a_fit_finds_constants_again(tmp_path):
    true = outside_entry(H200, "vllm").constants
    from dataclasses import replace

    from pkvsim.fitting.fit_step_tables import MeasuredStep

    steps = [MeasuredStep(r, c, b, m, 0) for r, c, b, m, _ in MEASURED]
    steps = [replace(s, us=us) for s, us in zip(steps, price_steps(steps, LLAMA, H200, true, VLLM))]
    free = ("matrix_share", "attention_share", "decode_share")
    start = replace(true, matrix_share=0.5, attention_share=0.4, decode_share=0.8)
    found = fit_step_tables(steps, LLAMA, H200, start, VLLM, free=free)
    assert all(getattr(found, name) == pytest.approx(getattr(true, name), rel=0.01) for name in free)


@given(st.lists(st.integers(1, 60_000), min_size=1, max_size=64), st.integers(1, 16))
@settings(max_examples=40)
def test_flash_decode_keeps_to_its_limits(lens, heads):
    lens = np.array(sorted(lens, reverse=True))
    us = flash_decode_us(lens, heads, 512.0, 132, 4400.0, 60.0, np.zeros(132))
    total = lens.sum() * heads * 512.0
    assert us >= total / (4400.0 * 1e3) * 0.999
    assert us <= total / (60.0 * 1e3) * 1.001  # as if one tile ran after the other


def test_flash_decode_pays_for_a_second_wave():
    """Rows times KV heads just above the SMs: the step that a real server shows between 16 and 17 rows."""
    def us(rows):
        return flash_decode_us(np.full(rows, 8416), 8, 512.0, 132, 4400.0, 61.0, np.zeros(132))

    assert us(17) / us(16) > 1.4 and us(32) / us(17) < 1.4


@given(st.sampled_from(sorted(DEVICES)), st.integers(1, 64), st.integers(1, 4000), st.integers(0, 3000))
@settings(max_examples=30, deadline=None)
def test_steps_of_every_gpu_keep_to_memory_and_arithmetic(name, rows, context, chunk):
    device = DEVICES[name]
    found = price([context] * rows, [(0, chunk)] if chunk else [], device=device)
    weights = sum(layer.weights().bytes * count for layer, count in LLAMA.layer_groups)
    assert found.us > weights / (device.peak_gb_s * 1e3)
    assert found.us > 2 * 6.9e9 * (rows + chunk) / (device.fp16_tflops * 1e6) / 1.1
    assert set(found.parts_us) == set(PARTS[:DRAFTS]) == set(found.basis) and found.band_percent > 0


@given(st.integers(1, 64), st.integers(1, 4000), st.integers(0, 3000))
@settings(max_examples=40, deadline=None)
def test_steps_of_kernels_of_our_own_keep_to_memory_arithmetic_and_the_host(rows, context, chunk):
    """Without decode attention, which the caller prices."""
    own = PROFILES["pkv"]
    found = price([context] * rows, [(0, chunk)] if chunk else [], profile=own).us
    weights = sum(layer.weights().bytes * count for layer, count in LLAMA.layer_groups)
    assert found > weights / (H200.peak_gb_s * 1e3)
    assert found > 2 * 6.9e9 * (rows + chunk) / (H200.fp16_tflops * 1e6) / outside_entry(H200, "pkv").constants.boost
    issue_us = 32 * outside_entry(H200, "pkv").constants.chunk_layer_us
    assert found >= issue_us * (1 - 1e-9) if chunk else found < issue_us  # a sum of parts
    assert price([context] * (rows + 1), [(0, chunk)] if chunk else [], profile=own).us >= found * (1 - 1e-9)


def test_parallel_layers_pay_for_their_sums():
    one, four = (
        price([2048] * 8, model=get_model("llama-3.1-8b", tensor_parallel=ranks)).parts_us for ranks in (1, 4)
    )
    assert one["all_reduce"] == 0 < four["all_reduce"]
    assert four["matrices"] < one["matrices"] and four["decode_attention"] < one["decode_attention"]


def test_batches_are_padded_to_graphs():
    assert price([1024] * 9).parts_us["matrices"] == price([1024] * 16).parts_us["matrices"]
    assert VLLM.padded(600)[[0, 1, 3, 9, 257, 512, 513]].tolist() == [0, 1, 4, 16, 272, 512, 513]
    assert len(VLLM.graph_sizes) == 51


def test_without_graphs_the_host_sets_the_pace():
    eager = EngineProfile(name="eager", constants="vllm", attention="flash")
    found = price([1024], profile=eager)
    assert found.us == pytest.approx(32 * outside_entry(H200, "vllm").constants.eager_layer_us)
    assert found.us > 2 * price([1024]).us


def test_a_gpu_that_is_busy_slows_down():
    cool, warm = (price(chunks=[(0, 2048)], warm=w).us for w in (0.0, 1.0))
    assert 1.1 < warm / cool < 1.5
    costs = step_costs(LLAMA, H200, outside_entry(H200, "vllm").constants, VLLM, step_tokens=2048, max_batch=8)
    heat = heated(costs, 0.0, 2048, 50_000.0)
    assert heat == 50_000.0 and heated(costs, heat, 1, 20_000.0) == 30_000.0


def test_where_decode_attention_is_the_callers():
    assert price([1024], profile=PROFILES["pkv"]).parts_us["decode_attention"] == 0


def test_what_a_step_stands_on():
    found = price([1024] * 4, [(0, 512)]).basis
    assert found["prefill_attention"] == found["decode_attention"] == "fitted"
    assert set(price([1024], device=get_device("a10")).basis.values()) == {"assumed"}


def test_gpus_that_nobody_measured_say_so():
    own, same, other = (outside_entry(get_device(name), "vllm") for name in ("h200", "gh200", "l4"))
    assert own.status == "fitted" and same.status == other.status == "estimated"
    assert own.band_percent <= same.band_percent <= other.band_percent
    assert "h200" in other.source or "rtx4090" in other.source


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ({"decode_lens": (0,)}, "decode_lens: expected"), ({"chunks": ((-1, 2),)}, "chunks: expected"),
        ({"chunks": ((0, 0),)}, "chunks: expected"), ({"decode_lens": (4,), "logits": 2}, "logits: expected"),
    ],
)  # fmt: skip
def test_work_that_is_none(work, message):
    with pytest.raises(ValueError, match=message):
        StepWork(**work)


def test_tables_that_are_none(tmp_path):
    path = tmp_path / "steps.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["decode_rows", "mean_context", "median_ms"], ["1", "x", "3"]])
    with pytest.raises(ValueError, match=r"steps.csv:2: expected numbers"):
        read_steps(path)
    with pytest.raises(ValueError, match="none.csv: cannot read steps"):
        read_steps(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="engine: expected one of"):
        get_profile("mine")
