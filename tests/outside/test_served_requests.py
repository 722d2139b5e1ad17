"""Real servers' requests, from constants fitted to steps: tokens per second, TTFT and TPOT."""
import csv
from collections import defaultdict

import numpy as np
import pytest
from paths import SHARED
from reference_server import ReferenceServer

from pkvsim.devices.device import get_device
from pkvsim.models.presets import get_model, weight_bytes
from pkvsim.outside.derive import outside_entry
from pkvsim.outside.engine_profile import get_profile
from pkvsim.outside.step_costs import step_costs

SERVING = SHARED / "reference" / "serving"
needs_shared = pytest.mark.skipif(not SERVING.exists(), reason="needs the measured serving runs")


def measured_cases(path, case=None):
    """(arrival, prompt, output) and (TTFT s, TPOT ms, end to end s) of every request, by case."""
    cases = defaultdict(list)
    for row in csv.DictReader(path.open()):
        request = float(row["arrived_at"]), int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])
        times = [float(row[f"measured_{name}"]) for name in ("ttft_s", "tpot_ms", "e2e_s")]
        cases[row.get("case", case)].append((request, times))
    return {name: ([r for r, _ in rows], np.array([t for _, t in rows])) for name, rows in cases.items()}


def serve(requests, device, num_pages):
    profile = get_profile("vllm")
    costs = step_costs(
        get_model("llama-3.1-8b"), device, outside_entry(device, "vllm").constants, profile, step_tokens=2304,
        max_batch=256,
    )
    return ReferenceServer(requests, costs, profile, num_pages=num_pages).run()


def tokens_per_s(requests, times):
    return sum(output for *_, output in requests) / max(a + e for (a, *_), e in zip(requests, times[:, 2]))


def off(got, true):
    return got / true - 1


@needs_shared
def test_the_requests_of_a_vllm_on_an_h200():
    """Eleven cases: 4 % in the mean in TPOT p50 and throughput, 7 % in TTFT p50 and p90."""
    errors = []
    for requests, true in measured_cases(SERVING / "h200_vllm_requests.csv").values():
        got = serve(requests, get_device("h200"), 56_105)
        errors.append(
            [off(tokens_per_s(requests, got), tokens_per_s(requests, true))]
            + [off(np.quantile(got[:, c], q), np.quantile(true[:, c], q)) for c, q in ((1, 0.5), (0, 0.5), (0, 0.9))]
        )
    throughput, tpot, ttft, ttft_p90 = np.abs(errors).mean(axis=0)
    assert throughput < 0.04 and tpot < 0.04
    assert ttft < 0.07 and ttft_p90 < 0.07


@needs_shared
def test_the_requests_of_a_vllm_on_an_rtx_4090():
    """KV blocks given (one of them is vLLM's own): tokens/s within 4 %, TPOT 6 %, TTFT 8 %."""
    (requests, true), = measured_cases(SERVING / "RTX4090_Llama-3.1-8B.csv").values()
    got = serve(requests, get_device("rtx4090"), 2_587)
    assert abs(off(tokens_per_s(requests, got), tokens_per_s(requests, true))) < 0.04
    for quantile in (0.5, 0.9, 0.99):
        assert abs(off(np.quantile(got[:, 1], quantile), np.quantile(true[:, 1], quantile))) < 0.06
    for quantile in (0.5, 0.9):
        assert abs(off(np.quantile(got[:, 0], quantile), np.quantile(true[:, 0], quantile))) < 0.08


@pytest.mark.parametrize(("gpu", "gib", "blocks"), [("rtx4090", 25_250_627_584 / 2**30, 2588), ("h200", 139.8, 56_105)])
def test_the_workspace_leaves_the_kv_blocks_that_a_vllm_reports(gpu, gib, blocks):
    """0.9 of the memory, less weights and workspace. RTX 4090: github.com/casys-kaist/LLMServingSim, 5daddb21."""
    left = 0.9 * gib - weight_bytes(get_model("llama-3.1-8b")) / 2**30 - get_profile("vllm").workspace_gib
    assert left * 2**30 / (16 * 131_072) == pytest.approx(blocks, rel=0.02)


@needs_shared
def test_an_rtx_4090_whose_kv_blocks_are_derived():
    """TTFT within 12 %."""
    (requests, true), = measured_cases(SERVING / "RTX4090_Llama-3.1-8B.csv").values()
    device = get_device("rtx4090")
    left = 0.9 * device.memory_gib - weight_bytes(get_model("llama-3.1-8b")) / 2**30 - get_profile("vllm").workspace_gib
    got = serve(requests, device, int(left * 2**30 / (16 * 131_072)))
    for quantile in (0.5, 0.9):
        assert abs(off(np.quantile(got[:, 0], quantile), np.quantile(true[:, 0], quantile))) < 0.12


def test_every_token_comes_once_and_pages_come_back():
    requests = [(0.01 * at, 40 + 13 * at, 5 + at) for at in range(20)]
    device = get_device("h200")
    server = ReferenceServer(
        requests, step_costs(
            get_model("llama-3.1-8b"), device, outside_entry(device, "vllm").constants, get_profile("vllm"),
            step_tokens=512, max_batch=16,
        ), get_profile("vllm"), num_pages=60, step_tokens=128, max_batch=16,
    )
    results = server.run()
    assert server.given == [output for *_, output in requests] and server.free == 60
    assert (results > 0).all()
