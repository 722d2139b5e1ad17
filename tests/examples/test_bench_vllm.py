"""bench_vllm without vLLM: its jobs and tables, agreement of tokens, and what a process that fails leaves."""
from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import math
import os
import sys
import time
import types

import bench_vllm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from serving.gguf_to_hf import token_ids
from vllm_bench import child, plans, serving, start
from vllm_bench.cases import (
    CAPTURED,
    CAPTURED_FOR_SHARED,
    GROUPS,
    LLAMA_8B,
    SHARED_GROUPS,
    Job,
    engine_arguments,
    environment,
    write_model,
    write_plugin,
)
from vllm_bench.report import times_table
from vllm_engine import Engine, modules, python_path, write_checked_model

from gpu.drop_ins.vllm.options import read_options
from gpu.serve.model.gguf import halves, hf_name


def test_shapes_drop_rows_and_fit_the_model_and_its_graphs() -> None:
    for group in (*GROUPS, *SHARED_GROUPS):
        rows = [shape.rows for shape in group.shapes]
        assert rows == sorted(rows, reverse=True) and rows[0] == len(group.prompts)
        assert max(group.prompts) + 4096 <= LLAMA_8B["max_position_embeddings"]
        assert max(rows) <= max(CAPTURED if group in GROUPS else CAPTURED_FOR_SHARED)
        assert all(group.shared_tokens < length for length in group.prompts) and group.shared_tokens % 16 == 0


def test_jobs_survive_their_file_and_say_what_vllm_is_given(tmp_path) -> None:
    job = Job("CUSTOM", "fp8", "model", "results.json", ("1.2K",), 7, cases=("a",))
    assert Job.read(job.write(tmp_path / "job.json")) == job and job.name == "CUSTOM fp8"
    given = engine_arguments(job)
    assert given["attention_backend"] == "CUSTOM" and given["load_format"] == "dummy"
    assert engine_arguments(Job("FLASHINFER", "auto", "m", "r"))["dtype"] == "float16"
    assert "compilation_config" not in engine_arguments(Job("CUSTOM", "auto", "m", "r", eager=True))
    assert engine_arguments(Job("CUSTOM", "auto", "m", "r", tokens=True))["load_format"] == "auto"
    assert json.loads((write_model(tmp_path / "m", LLAMA_8B) / "config.json").read_text()) == LLAMA_8B
    told = environment(write_plugin(tmp_path / "plugin"))
    assert told["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "plugin")


@pytest.fixture
def engine(monkeypatch) -> Engine:
    """The engine that jobs of this process get."""
    made, one = modules(), Engine()
    made["vllm"].LLM = lambda **given: types.SimpleNamespace(llm_engine=one)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("TRITON_CACHE_DIR", "kept")
    return one


def test_steps_are_timed_in_which_every_row_decodes_and_none_else(tmp_path, engine) -> None:
    results = tmp_path / "results.json"
    job = Job("FLASH_ATTN", "auto", "model", str(results), plans.EVERY_GROUP, steps=5)
    child.run(job)
    found = {one["shape"]: one for one in json.loads(results.read_text())["shapes"]}
    assert [*found] == [shape.name for group in GROUPS for shape in group.shapes]
    assert all(one["steps"] == 5 for one in found.values()) and not engine.left
    assert 32700 < found["4 x 32.8K"]["mean_context"] < 33400
    child.run(Job("FLASH_ATTN", "auto", "model", str(results), ("120K",), steps=5, until=0.0))
    assert json.loads(results.read_text())["shapes"] == []  # out of time


def test_rows_of_one_prompt_have_the_same_blocks_or_an_error(tmp_path, engine) -> None:
    pytest.importorskip("torch", reason="torch is not installed")  # jobs of ours count what its engines run
    results = tmp_path / "results.json"
    stages = plans.shared(_given(tmp_path), ("CUSTOM", "FLASH_ATTN", "TRITON_ATTN"), 5)
    jobs = [dataclasses.replace(job, results=str(results)) for stage in stages for job in stage]
    assert [job.name for job in jobs] == ["CUSTOM", "CUSTOM shared prefixes", "FLASH_ATTN", "FLASH_ATTN cascade",
                                          "TRITON_ATTN"]
    for job in jobs[1:4:2]:
        child.run(job)
        (found,) = [json.loads(results.read_text())]
        assert bench_vllm.name_of(found) == job.name
        assert [one["shape"] for one in found["shapes"]] == [
            shape.name for group in SHARED_GROUPS if group.name in job.groups for shape in group.shapes]
        assert found["shapes"][0]["distinct_blocks"] == 512 + 32 * 32 and found["shapes"][0]["blocks"] == 32 * 544
    assert bench_vllm.report([found]) == 0
    engine.caches = False
    with pytest.raises(RuntimeError, match="8K shared: expected prefix caching to save"):
        child.run(jobs[0])


def test_what_shared_engines_are_given(engine) -> None:
    from vllm.config import VllmConfig

    asked = engine_arguments(Job("CUSTOM", "auto", "m", "r", prefix_caching=True, shared_prefixes=True))
    assert asked["enable_prefix_caching"] and read_options(asked["additional_config"]).shared_prefixes
    assert "additional_config" not in engine_arguments(Job("CUSTOM", "auto", "m", "r", prefix_caching=True))
    assert engine_arguments(Job("FLASH_ATTN", "auto", "m", "r", cascade=True))["disable_cascade_attn"] is False
    config = VllmConfig()
    config.additional_config = asked["additional_config"]
    start.start_sooner(Job("FLASH_ATTN", "auto", "m", "r", cascade=True))
    assert config.compute_hash() != "{}" and not config.use_v2_model_runner
    start.start_sooner(Job("CUSTOM", "auto", "m", "r", shared_prefixes=True))
    assert config.compute_hash() == "{}" and config.additional_config == asked["additional_config"]


def test_layers_skip_attention_only_while_told_to() -> None:
    ran, output = [], np.ones(3)
    zeroed = types.SimpleNamespace(zero_=lambda: output.fill(0))
    layer = types.SimpleNamespace(impl=types.SimpleNamespace(forward=lambda *args, **kwargs: ran.append(kwargs)))
    skip = start.prefills_without_attention({"layer": layer, "other": types.SimpleNamespace()})
    skip(True)
    layer.impl.forward(layer, 1, 2, 3, 4, 5, output=zeroed, output_scale=None)
    assert not output.any() and not ran
    output.fill(1)
    layer.impl.forward(layer, 1, 2, 3, 4, 5, zeroed)
    assert not output.any() and not ran
    skip(False)
    layer.impl.forward(layer, 1, 2, 3, 4, 5, output=zeroed)
    assert len(ran) == 1


def test_a_graph_is_shared_but_where_it_quantises_queries(engine) -> None:
    from vllm.config import AttentionConfig, CacheConfig

    for backend, kind, shared in (("TRITON_ATTN", "fp8", False), ("CUSTOM", "fp8", True), ("TRITON_ATTN", "auto", True)):
        for config in (AttentionConfig, CacheConfig):
            config.compute_hash = None
        start.start_sooner(Job(backend, kind, "m", "r"))
        assert (AttentionConfig.compute_hash is not None, CacheConfig.compute_hash is not None) == (shared, shared)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.floats(0, 0.01), st.integers(1, 5000), st.integers(1, 9)), min_size=1, max_size=12))
def test_cases_are_served_whole(requests) -> None:
    engine = Engine()
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules().items():
            patch.setitem(sys.modules, name, module)
        timed = sorted((serving.Timed(*request, 0.5, 2.0, 1.0) for request in requests), key=lambda one: one.arrived_s)
        served = serving.serve_case(engine, timed, itertools.count(), math.inf)
        assert served["complete"] and not engine.left
        tokens = sum(one.output_tokens for one in timed)
        for side in ("own", "reference"):
            assert served[side]["tokens_per_s"] * served[side]["wall_s"] == pytest.approx(tokens)
        assert served["reference"]["ttft_mean_s"] == 0.5 and served["own"]["ttft_mean_s"] > 0
        assert not serving.serve_case(engine, timed, itertools.count(), 0.0)["complete"] and not engine.left
        short = Engine("short")
        with pytest.raises(RuntimeError, match="another number of tokens"):
            serving.serve_case(short, [serving.Timed(0.0, 7, 5)], itertools.count(), math.inf)


def test_a_mix_counts_what_ends_wrong(engine, monkeypatch) -> None:
    monkeypatch.setattr(serving, "MIX_SECONDS_PER_ROWS", 0.05)
    monkeypatch.setattr(serving, "MIX_TOLD_S", 0.05)
    told = [dict(found) for found in serving.mix(engine, 0.4, itertools.count())]
    found = told[-1]
    assert len(told) > 2 and [one["steps"] for one in told] == sorted(one["steps"] for one in told)
    assert found["finished"] and found["aborted"] and not found["wrong"] and not engine.left
    assert found["most_rows"] > 1 and found["longest"] > 1000
    *_, found = serving.mix(Engine("short"), 0.2, itertools.count())
    assert found["wrong"]


def _write_requests(path) -> str:
    lines = ["case,arrived_at,num_prefill_tokens,num_decode_tokens,measured_ttft_s,measured_tpot_ms,measured_e2e_s"]
    lines += [f"{name},0.0,100,5,0.01,4.9,0.03" for name in (*plans.SHORT_CASES, *plans.LONG_CASES)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def _given(tmp_path, **changed: object) -> plans.Given:
    now = time.monotonic()
    fields = {"llama": "model", "checked": "model", "results": tmp_path, "requests": "", "begin": now, "end": now + 60}
    return plans.Given(**fields | changed)


def test_plans_time_engines_alone_and_every_shape_with_every_backend(tmp_path) -> None:
    stages = [stage for name in plans.PLANS for stage in plans.plan(name, _given(tmp_path, requests="some.csv"))]
    timed = [stage for stage in stages if any(job.groups or job.cases for job in stage)]
    assert all(len(stage) == 1 for stage in timed)
    whole = {stage[0].backend for stage in timed if stage[0].groups == plans.EVERY_GROUP}
    assert whole == {"CUSTOM", "FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"}
    results = [job.results for stage in plans.plan("checks", _given(tmp_path)) for job in stage]
    assert len({*results}) == len(results) == 9
    [[mixed]] = plans.plan("mix", _given(tmp_path, seed=3))
    assert mixed.mix_s > 0 and mixed.seed == 3
    with pytest.raises(ValueError, match="plan: expected one of"):
        plans.plan("all", _given(tmp_path))


def test_a_process_for_each_job_and_what_failed_leaves_the_rest(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path / "packages"))
    kept, end = tmp_path / "kept.json", time.monotonic() + 20
    jobs = [Job("FLASH_ATTN", "auto", model, str(tmp_path / f"{model}.json"), ("azure",), 3, end)
            for model in ("fails", "model")]
    jobs.append(Job("TRITON_ATTN", "auto", "hangs", str(tmp_path / "hangs.json"), ("azure",), 3, end, limit_s=0.1,
                    grace_s=0.1))
    jobs.append(Job("CUSTOM", "auto", "late", str(tmp_path / "late.json"), until=0.0))
    found = bench_vllm.run_stages([[jobs[0], jobs[1]], [jobs[2]], [jobs[3]]], tmp_path, kept)
    assert [one["shapes"][0]["shape"] for one in found] == ["32 x azure"] and json.loads(kept.read_text()) == found
    said = capfd.readouterr().out
    for line in ("each job runs in a fork", "FLASH_ATTN: ended with 1", "no kernel image is available",
                 "FLASH_ATTN: once more, started as vLLM", "32 x azure: ", "TRITON_ATTN: out of time", "CUSTOM: not begun"):
        assert line in said
    assert "ValueError: no kernel image" in kept.with_suffix(".log").read_text()


def test_checks_compare_tokens_and_say_what_is_wrong(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path / "packages"))
    arguments = argparse.Namespace(seconds=20.0, model=write_checked_model(tmp_path / "checked"), check=True, plan=None,
                                   shared=False, kv_cache_dtype="auto", eager=False, json=tmp_path / "kept.json")
    assert bench_vllm.run(arguments, tmp_path) == 0
    said = capfd.readouterr().out
    assert "CUSTOM against FLASH_ATTN: 448 tokens agree" in said and "    within: 0 of 0 partings beyond" in said
    assert bench_vllm.report(bench_vllm.read_json(arguments.json)) == 0
    assert capfd.readouterr().out == said[said.index("TRITON_ATTN against"):]
    for name, kind, reason in (("swaps", "auto", "7 of 7 partings beyond"), ("off", "fp8", "within 0.5000, wanted 0.0")):
        arguments.model, arguments.kv_cache_dtype = write_checked_model(tmp_path / name), kind
        assert bench_vllm.run(arguments, tmp_path) == 1
        said = capfd.readouterr().out
        assert said.count("NOT within: ") == 1 and reason in said
    arguments.model, arguments.kv_cache_dtype = write_checked_model(tmp_path / "silent"), "auto"
    assert bench_vllm.run(arguments, tmp_path) == 1
    assert "3 engines made no tokens" in capfd.readouterr().out
    assert bench_vllm.report([{"backend": "CUSTOM", "kv_cache_dtype": "auto", "shapes": [], "cases": {},
                               "error": "RuntimeError: engine is dead"}]) == 1
    assert "engine is dead" in capfd.readouterr().out


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'[{"backend": "CUSTOM"}]', b"\xff\xfe"])
def test_what_is_no_report_is_said_in_a_line(tmp_path, monkeypatch, capfd, content) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["bench_vllm.py", "--report", str(path)])
    with pytest.raises(SystemExit) as ended:
        bench_vllm.main()
    assert ended.value.code == 2 and "--report: expected a file that --json wrote" in capfd.readouterr().err


WRONG_OPTIONS = (
    ("--groups", "1.2K,9K"), ("--groups", ""), ("--backends", "CUSTOM,"), ("--steps", "0"), ("--seconds", "0"),
    ("--seconds", "nan"), ("--seed", "-1"), ("--model", "nowhere"), ("--json", "nowhere/found.json"),
    ("--requests", "nowhere.csv"), ("--requests", "."), ("--requests", "empty.csv"), ("--requests", "columns.csv"),
    ("--requests", "words.csv"))


@pytest.mark.parametrize("option, value", WRONG_OPTIONS)
def test_options_that_no_engine_could_take_are_refused_before_any_starts(tmp_path, monkeypatch, capfd, option,
                                                                        value) -> None:
    columns = "case,arrived_at,num_prefill_tokens,num_decode_tokens\n"
    for name, text in (("empty", columns), ("columns", "case,arrived_at\na,1\n"), ("words", columns + "a,0,many,3\n")):
        (tmp_path / f"{name}.csv").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_vllm.py", option, value])
    monkeypatch.setattr(bench_vllm, "run_stages", lambda *args: pytest.fail("engines were started"))
    with pytest.raises(SystemExit) as exit_:
        bench_vllm.main()
    said = capfd.readouterr().err.strip()
    assert exit_.value.code == 2 and said.startswith(f"bench_vllm: error: {option}: expected ") and "\n" not in said


def test_cases_stand_beside_the_file_of_requests(tmp_path, engine, capfd) -> None:
    results = tmp_path / "results.json"
    child.run(Job("FLASH_ATTN", "auto", "model", str(results), requests=_write_requests(tmp_path / "requests.csv"),
                  cases=(*plans.SHORT_CASES, "unknown")))
    found = json.loads(results.read_text())
    assert [*found["cases"]] == [*plans.SHORT_CASES]
    assert bench_vllm.report([found]) == 0
    said = capfd.readouterr().out
    assert "i8192_o256_c32" in said and "166.7" in said  # 5 tokens in 0.03 s


def test_the_table_puts_ours_beside_the_best_other() -> None:
    shapes = {"CUSTOM": 9.0, "FLASH_ATTN": 10.0, "TRITON_ATTN": 12.0}
    found = [{"backend": name, "kv_cache_dtype": "auto", "shapes": [{"shape": "8 x 32.8K", "median_ms": ms}]}
             for name, ms in shapes.items()]
    found.append({"backend": "CUSTOM", "kv_cache_dtype": "fp8", "shapes": []})
    console = Console(width=160, file=io.StringIO())
    console.print(times_table(found))
    text = console.file.getvalue()
    assert "-10.0" in text and "12.90" in text and "CUSTOM fp8" in text and "1 x 120K" not in text


def test_gguf_names_rows_and_texts() -> None:
    assert hf_name("blk.3.attn_output.weight") == "model.layers.3.self_attn.o_proj.weight"
    assert hf_name("output_norm.weight") == "model.norm.weight"
    weight = np.arange(2 * 6 * 3).reshape(12, 3)  # [2 heads of 6, 3] as Hugging Face has them
    pairs = weight.reshape(2, 2, 3, 3).swapaxes(1, 2).reshape(12, 3)  # llama.cpp's convert_hf_to_gguf.py, permute
    assert (halves(pairs, 2) == weight).all()
    assert token_ids("a b\na", ["a", "Ġb", "Ċ", "b", "Ġ", "ĊĊ"]) == [0, 1, 2, 0]
