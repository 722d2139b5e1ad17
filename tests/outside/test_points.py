"""Published serving points: closed loops, the fit to half of them, and what the shipped constants say of all."""
from dataclasses import replace

import numpy as np
import pytest
from paths import SHARED

from pkvsim.devices.device import get_device
from pkvsim.fitting.closed_loop import closed_loop
from pkvsim.fitting.fit_serving import BOUNDS, errors, fit_constants, half_of
from pkvsim.fitting.serving_points import ServingPoint, point_model, price_points, read_points
from pkvsim.models.model_costs import weight_bytes
from pkvsim.models.presets import get_model
from pkvsim.outside.derive import outside_entry
from pkvsim.outside.engine_profile import get_profile
from pkvsim.outside.step_costs import PARTS, step_costs, step_parts

POINTS = SHARED / "reference" / "serving" / "h100_h200_llama_points.csv"
needs_shared = pytest.mark.skipif(not POINTS.exists(), reason="needs the published points")
H200 = get_device("h200")
# Of aiconfigurator's silicon_sample.csv (github.com/ai-dynamo/aiconfigurator, Apache-2.0), runs of SemiAnalysis
# InferenceX: Llama-3.1-70B in FP8 on H200, vLLM: prompt, output, GPUs, clients, TTFT, TPOT in ms.
SAMPLE = (
    (1024, 1024, 1, 4, 202.75, 21.46), (1024, 8192, 1, 16, 325.13, 27.29), (8192, 1024, 1, 8, 1660.2, 33.07),
    (1024, 1024, 2, 8, 154.12, 14.35), (8192, 1024, 2, 16, 1248.9, 27.47), (1024, 8192, 2, 64, 412.97, 26.84),
    (1024, 1024, 4, 4, 90.58, 9.85), (8192, 1024, 4, 16, 775.24, 17.43), (1024, 8192, 4, 64, 256.79, 18.46),
    (1024, 1024, 8, 16, 109.29, 9.71), (8192, 1024, 8, 8, 394.91, 10.08), (1024, 8192, 8, 32, 133.5, 11.03),
)  # fmt: skip


def point(prompt, output, ranks, clients, ttft, tpot, engine="vllm"):
    return ServingPoint(
        engine=engine, model="meta-llama/Llama-3.1-70B", device="h200", precision="fp8", prompt=prompt, output=output,
        tensor_parallel=ranks, clients=clients, ttft_ms=ttft, tpot_ms=tpot, drawn_lengths=True, ttft_counts=True,
    )


@pytest.mark.slow
def test_the_shipped_constants_meet_published_points():
    points = [point(*row) for row in SAMPLE]
    found = errors(points, price_points(points, H200, outside_entry(H200, "vllm").constants))
    assert found.tpot_median < 8 and found.tpot_mean < 12 and found.ttft_median < 20


@needs_shared
@pytest.mark.parametrize(
    ("engine", "name"),
    [("vllm", "h200"), ("vllm", "h100_sxm"), ("trtllm", "h200"), ("trtllm", "h100_sxm"), ("sglang", "h200")],
)
def test_all_points_by_engine_and_gpu(engine, name):
    device = get_device(name)
    points = [p for p in read_points(POINTS) if (p.engine, p.device) == (engine, name)]
    found = errors(points, price_points(points, device, outside_entry(device, engine).constants))
    assert found.tpot_median < 8 and found.tpot_mean < 12
    assert found.ttft_median < 20 or not any(p.ttft_counts for p in points)
    held_out = outside_entry(device, engine).held_out
    assert held_out.median_percent < 8 and held_out.mean_percent < 12


@needs_shared
def test_an_h100_from_the_h200s_constants_alone():
    """A GPU that nobody measured: the same engine's shares on its own numbers, within the band that it is given."""
    h100 = replace(get_device("h100_sxm"), outside={})
    entry = outside_entry(h100, "vllm")
    points = [p for p in read_points(POINTS) if (p.engine, p.device) == ("vllm", "h100_sxm")]
    priced = price_points(points, h100, entry.constants)
    found = errors(points, priced)
    assert entry.status == "estimated" and found.tpot_median < 10
    off = np.abs(priced[:, 1] / [p.tpot_ms for p in points] - 1)
    assert np.quantile(off, 0.9) < entry.band_percent / 100


@pytest.mark.slow
@pytest.mark.parametrize("times", [0.2, 8.0])
def test_no_constant_leaves_what_it_can_be(times):
    """Shares stay parts of the GPU's own numbers where runs are faster than any GPU, from a start that is none."""
    points = [replace(found, ttft_ms=found.ttft_ms * times, tpot_ms=found.tpot_ms * times)
              for found in (point(*row) for row in SAMPLE)]  # fmt: skip
    start = replace(outside_entry(H200, "vllm").constants, decode_share=1.3, kernel_us=40.0)
    free = ("decode_share", "weight_share", "kernel_us")
    fitted, names = fit_constants(points, H200, start, free=free)
    found = {name: getattr(fitted, name) for name in names}
    assert set(names) == set(free) and all(BOUNDS[name][0] <= found[name] <= BOUNDS[name][1] for name in names)
    assert times > 1 or found["weight_share"] == 1.0


@needs_shared
@pytest.mark.slow
def test_half_of_sglangs_points_predict_the_others():
    start = outside_entry(H200, "vllm").constants
    points = [p for p in read_points(POINTS) if p.engine == "sglang"]
    half = half_of(len(points), 1)
    fitted, names = fit_constants([p for p, taken in zip(points, half) if taken], H200, start)
    assert {"token_us", "token_place_us"} <= set(names)
    others = [p for p, taken in zip(points, half) if not taken]
    found = errors(others, price_points(others, H200, fitted))
    assert found.tpot_median < 8 and found.tpot_mean < 12 and found.ttft_median < 20


def loop(prompts, outputs, clients, *, token_us=0.0, place_us=0.0, room=1 << 40, reserve=0.0, flight=1, mixes=True, step_tokens=2048):
    profile = get_profile("vllm")
    costs = step_costs(
        get_model("llama-3.1-8b"), H200, outside_entry(H200, "vllm").constants, profile, step_tokens=4096, max_batch=64
    )
    costs = costs._replace(token_us=token_us, token_place_us=place_us)
    return costs, closed_loop(
        costs, np.asarray(prompts), np.asarray(outputs), clients, step_tokens, room, reserve, flight, mixes
    )


def test_one_client_pays_for_its_own_steps():
    costs, (ttft_us, tpot_us) = loop([1000] * 3, [101] * 3, 1)
    parts, none = np.zeros(len(PARTS)), np.zeros(0, np.int64)
    decode_us = step_parts(costs, np.array([1050]), none, none, 1, 0.0, 1.0, parts)
    assert tpot_us == pytest.approx(decode_us, rel=0.02)
    prefill = step_parts(costs, none, np.array([0]), np.array([1000]), 1, 0.0, 0.0, parts)
    assert ttft_us == pytest.approx(prefill, rel=0.05)


def test_a_full_cache_makes_requests_wait_or_give_way():
    args = [512] * 24, [256] * 24, 8
    free = loop(*args)[1]
    waits = loop(*args, room=3000, reserve=1.0)[1]
    gives_way = loop(*args, room=3000)[1]
    assert waits[0] > 3 * free[0] and waits[1] < free[1]
    assert gives_way[1] > waits[1] and gives_way[0] < waits[0]


def test_steps_in_flight_delay_what_comes():
    assert loop([512] * 40, [64] * 40, 8, flight=2)[1][0] > loop([512] * 40, [64] * 40, 8)[1][0]


@pytest.mark.parametrize("place_us", [0.0, 10.0])
def test_a_process_that_streams_too_slowly_sets_the_pace(place_us):
    """The clients wait for it, for the first tokens too, and the server's batch shrinks to what it can hand on."""
    free = loop([64] * 80, [200] * 80, 16)[1]
    slow = loop([64] * 80, [200] * 80, 16, token_us=2000.0, place_us=place_us)[1]
    hardly = loop([64] * 80, [200] * 80, 16, token_us=1.0)[1]
    pace_us = 16 * (2000 + place_us * 100)
    assert hardly == pytest.approx(free, rel=0.01)
    assert slow[0] > free[0] + 15 * 2000
    assert slow[0] + 199 * slow[1] == pytest.approx(200 * pace_us, rel=0.15)  # a whole request, closed loop


def test_halves_are_random_and_whole():
    half = half_of(41, 3)
    assert half.sum() == 20 and (half != half_of(41, 4)).any()


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="points: expected at least 12, got 3"):
        fit_constants([point(*row) for row in SAMPLE[:3]], H200, outside_entry(H200, "vllm").constants)


def test_points_models():
    assert weight_bytes(point_model(point(*SAMPLE[0]))) == pytest.approx(72.7e9, rel=0.01)
    with pytest.raises(ValueError, match="points: no preset of the model acme/Other"):
        point_model(replace(point(*SAMPLE[0]), model="acme/Other"))


@pytest.mark.parametrize(("field", "value"), [("isl", "x"), ("silicon_tpot_ms", "0"), ("concurrency", "-4")])
def test_odd_points_are_refused(tmp_path, field, value):
    row = {
        "backend": "vllm", "model_path": "m", "system": "h200_sxm", "precision": "fp8", "isl": "1", "osl": "1",
        "tp_size": "1", "concurrency": "1", "silicon_ttft_ms": "1", "silicon_tpot_ms": "1", "source": "mine",
    } | {field: value}  # fmt: skip
    path = tmp_path / "points.csv"
    path.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    with pytest.raises(ValueError, match=f"points.csv:2: {field}: expected a number"):
        read_points(path)
