"""Steps priced as whatif prices them, constants fitted to steps, and bench_serve's loads on a small model."""
from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from paths import ROOT, SHARED

pytest.importorskip("torch")
sys.path.insert(0, str(ROOT / "examples"))
from serve_bench import predictions  # noqa: E402

from gpu.serve.llm import LLM, ServeOptions  # noqa: E402
from gpu.serve.step import StepRecord  # noqa: E402
from gpu.serve.step_prices import fit_device, measured_us, price_steps, step_errors  # noqa: E402
from pkvsim.devices.device import get_device  # noqa: E402
from pkvsim.models.presets import get_model  # noqa: E402
from pkvsim.outside.derive import outside_entry  # noqa: E402
from pkvsim.serving.server_config import ServingConfig  # noqa: E402
from pkvsim.serving.simulate import simulate  # noqa: E402
from pkvsim.traces.distributions import constant  # noqa: E402
from pkvsim.traces.synthetic import make_load  # noqa: E402

MODEL, DEVICE = get_model("llama-3.1-8b"), get_device("h200")
CONFIG = ServingConfig(max_batch=64, step_tokens=2048, shared_reads=False)
TINY = {"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 64, "num_key_value_heads": 1, "vocab_size": 99,
        "max_position_embeddings": 131072, "torch_dtype": "bfloat16"}


def record(lens: list[int], chunks: list[tuple[int, int]], *, follows: bool = True) -> StepRecord:
    begins, tokens = (np.array([chunk[at] for chunk in chunks], np.int64) for at in (0, 1))
    return StepRecord(
        start_us=0.0, end_us=0.0, kind="decode" if not chunks else "mixed" if lens else "prefill", decode_rows=len(lens),
        padded_rows=len(lens), context_tokens=sum(lens), prefill_tokens=int(tokens.sum()), chunks=len(chunks), running=1,
        prefill_context=int(begins.sum()), waiting=0, pages=1, preempted=0, plan_us=0.0, follows=follows,
        decode_lens=np.array(lens, np.int64), chunk_begins=begins, chunk_tokens=tokens)


def lasting(steps: list[StepRecord], us: np.ndarray) -> list[StepRecord]:
    """The steps behind each other, 5 us between them."""
    ends = np.cumsum(us)
    return [replace(step, start_us=end - taken + 5 * step.follows, end_us=end)
            for step, taken, end in zip(steps, us, ends)]


def test_prices_are_those_of_the_simulator() -> None:
    """A request alone, whose steps are known: its prompt in two chunks, then a token each."""
    trace = make_load(input_tokens=constant(3000), output_tokens=constant(20), requests=1)
    result = simulate(trace, MODEL, DEVICE, "balanced", CONFIG)
    steps = [record([], [(0, 2048)], follows=False), record([], [(2048, 952)])]
    steps += [record([3001 + at], []) for at in range(19)]
    assert price_steps(steps, MODEL, DEVICE, CONFIG).sum() == pytest.approx(result.totals["duration_us"], rel=1e-9)


def test_a_fit_finds_what_made_the_steps() -> None:
    rng, name = np.random.default_rng(0), CONFIG.profile.constants
    entry = outside_entry(DEVICE, name)
    other = replace(entry.constants, matrix_share=0.55, weight_share=0.8, few_us=3.0, kernel_us=4.0, step_us=60.0,
                    row_us=1.0, wake_factor=1.3)
    true = replace(DEVICE, outside={**DEVICE.outside, name: replace(entry, constants=other)})
    steps = [record(rng.integers(100, 4000, int(rng.integers(1, 65))).tolist(), []) for _ in range(120)]
    steps += [record(rng.integers(100, 4000, int(rng.integers(0, 40))).tolist(),
                     [(int(rng.integers(0, 6000)), int(rng.integers(16, 2000)))]) for _ in range(80)]
    steps += [record([], [(0, int(rng.integers(200, 2000)))], follows=False) for _ in range(8)]
    timed = lasting(steps, price_steps(steps, MODEL, true, CONFIG) * rng.normal(1, 0.01, len(steps)))
    assert step_errors(timed, price_steps(timed, MODEL, DEVICE, CONFIG))[0].mean > 0.1
    fitted = fit_device(timed, MODEL, DEVICE, CONFIG, source="drawn steps")
    errors = step_errors(timed, price_steps(timed, MODEL, fitted, CONFIG))
    assert [error.kind for error in errors] == ["all", "decode", "mixed", "prefill"]
    assert all(error.mean < 0.015 and abs(error.bias) < 0.01 for error in errors)
    assert fitted.outside[name].constants.wake_factor == pytest.approx(1.3, rel=0.02)
    assert fitted.outside[name].status == "fitted" and fitted.outside[name].in_sample.mean_percent < 1.5
    assert DEVICE.outside.get(name) is not fitted.outside[name]
    with pytest.raises(ValueError, match="steps: expected some that follow others"):
        fit_device([replace(step, follows=False) for step in timed[:5]], MODEL, DEVICE, CONFIG, source="none")


def test_a_step_lasts_from_the_end_of_the_one_before_where_the_device_should_not_have_waited() -> None:
    steps = [replace(record([9], [], follows=follows), start_us=start, end_us=start + 10.0)
             for start, follows in ((0.0, True), (14.0, True), (90.0, False), (101.0, True))]
    assert measured_us(steps).tolist() == [10, 14, 10, 11]


@pytest.mark.parametrize("folder", [None, SHARED / "traces"])
def test_the_loads_are_served_and_predicted(tmp_path, folder) -> None:
    if folder is not None and not folder.is_dir():
        pytest.skip("the traces are not here")
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    llm = LLM(str(tmp_path / "tiny.json"), ServeOptions(device="cpu", dummy_weights=True, max_batch=32, step_tokens=256,
                                                       num_pages=3000), record=True)
    fit = folder is None
    device, found, runs = predictions.predictions(llm, DEVICE, folder, scale=1 / 100, fit=fit)
    assert [one.requests for one in found] == [300, 60, 64] and len(runs) == (7 if fit else 3)
    assert found[0].name == ("like Azure code" if fit else "azure2023_code")
    for one, run in zip(found, runs[-3:]):
        assert all(measured > 0 and predicted > 0 for measured, predicted in one.figures.values())
        assert one.steps[0].steps == len(run.steps) and not one.within
    assert (device is DEVICE) != fit
    json.dumps([one.to_dict() for one in found], allow_nan=False)
    predictions.save_steps(tmp_path / "steps.npz", runs)
    with np.load(tmp_path / "steps.npz") as saved:
        assert saved["rows"].sum() == len(saved["lens"]) and saved["chunks"].sum() == len(saved["chunk_begins"])
        assert saved["run"].max() == len(runs) - 1 and len(saved["run"]) == sum(len(run.steps) for run in runs)


def test_an_interrupt_keeps_the_loads_that_were_predicted(tmp_path, monkeypatch) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    llm = LLM(str(tmp_path / "tiny.json"), ServeOptions(device="cpu", dummy_weights=True, max_batch=32, step_tokens=256,
                                                       num_pages=3000), record=True)
    served, asked, said = predictions._served, [], []

    def interrupted(llm, trace, say):
        asked.append(trace)
        if len(asked) == limit:
            raise KeyboardInterrupt
        return served(llm, trace, say)

    monkeypatch.setattr(predictions, "_served", interrupted)
    limit = 2
    _, found, runs = predictions.predictions(llm, DEVICE, None, scale=1 / 100, fit=False, say=said.append)
    assert [one.requests for one in found] == [300] and len(runs) == 1 and "interrupted" in said[-1]
    limit = 3
    with pytest.raises(KeyboardInterrupt):
        predictions.predictions(llm, DEVICE, None, scale=1 / 100, fit=False)
