"""bench_vllm without vLLM: its jobs and tables, agreement of tokens, and what a process that fails leaves."""
from __future__ import annotations

import io
import json
import os
import sys
import types
from collections import deque

import bench_vllm
import numpy as np
import pytest
from bench import vllm_child
from bench.vllm_cases import CAPTURED, GROUPS, LLAMA_8B, Job, engine_arguments, environment, write_model, write_plugin
from bench.vllm_report import compare, times_table
from rich.console import Console
from serving.gguf_to_hf import token_ids

from gpu.serve.model.gguf import halves, hf_name


def test_shapes_drop_rows_and_fit_the_model_and_its_graphs() -> None:
    for group in GROUPS:
        rows = [shape.rows for shape in group.shapes]
        assert rows == sorted(rows, reverse=True) and rows[0] == len(group.prompts)
        assert max(group.prompts) + 4096 <= LLAMA_8B["max_position_embeddings"]
        assert max(rows) <= max(CAPTURED)


def test_jobs_survive_their_file_and_say_what_vllm_is_given(tmp_path) -> None:
    job = Job("CUSTOM", "fp8", "model", "results.json", ("1.2K",), 7, 3.0)
    assert Job.read(job.write(tmp_path / "job.json")) == job and job.name == "CUSTOM fp8"
    given = engine_arguments(job)
    assert given["attention_backend"] == "CUSTOM" and given["load_format"] == "dummy"
    assert engine_arguments(Job("FLASHINFER", "auto", "m", "r"))["dtype"] == "float16"
    assert "compilation_config" not in engine_arguments(Job("CUSTOM", "auto", "m", "r", eager=True))
    assert json.loads((write_model(tmp_path / "m", LLAMA_8B) / "config.json").read_text()) == LLAMA_8B
    told = environment(write_plugin(tmp_path / "plugin"), "CUSTOM")
    assert told["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "plugin")


def test_a_process_that_fails_leaves_what_it_wrote(tmp_path, monkeypatch, capfd) -> None:
    script = tmp_path / "child.py"
    script.write_text("import sys, json, pathlib\njob = json.loads(pathlib.Path(sys.argv[2]).read_text())\n"
                      "pathlib.Path(job['results']).write_text(json.dumps({'shapes': []}))\nsys.exit(3)")
    monkeypatch.setattr(bench_vllm, "__file__", str(script))
    job = Job("CUSTOM", "auto", "model", str(tmp_path / "results.json"))
    assert bench_vllm.run_job(job, tmp_path, 60) == {"shapes": []}
    assert "ended with 3" in capfd.readouterr().out
    script.write_text("import time\ntime.sleep(60)")
    (tmp_path / "results.json").unlink()
    assert bench_vllm.run_job(job, tmp_path, 1) is None and "out of time" in capfd.readouterr().out


class Engine:
    """vllm.LLMEngine with asynchronous scheduling: outputs come a step late, and prompts are prefilled in chunks."""

    def __init__(self) -> None:
        self.left, self.queue = {}, deque()
        scheduler = types.SimpleNamespace(async_scheduling=True)
        compilation = types.SimpleNamespace(cudagraph_mode="FULL_AND_PIECEWISE")
        self.vllm_config = types.SimpleNamespace(scheduler_config=scheduler, compilation_config=compilation)

    def add_request(self, row: str, prompt: dict, params: object) -> None:
        assert row not in self.left and min(prompt["prompt_token_ids"]) >= 0
        assert len(prompt["prompt_token_ids"]) + params.max_tokens <= LLAMA_8B["max_position_embeddings"]
        self.left[row] = len(prompt["prompt_token_ids"])

    def abort_request(self, rows: list[str]) -> None:
        self.left = {row: left for row, left in self.left.items() if row not in rows}

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list:
        room, made = 2048, []
        for row, left in self.left.items():
            taken = min(left, room) if left else 1
            room -= taken
            self.left[row] -= taken if left else 0
            made += [row] if not self.left[row] and taken else []
        self.queue.append(made)
        if len(self.queue) < 2:
            return []
        outputs = [types.SimpleNamespace(token_ids=[7])]
        rows = [row for row in self.queue.popleft() if row in self.left]
        return [types.SimpleNamespace(request_id=row, outputs=outputs) for row in rows]


def test_steps_are_timed_in_which_every_row_decodes_and_none_else(tmp_path, monkeypatch) -> None:
    engine = Engine()
    vllm = types.ModuleType("vllm")
    vllm.LLM = lambda **given: types.SimpleNamespace(llm_engine=engine)
    vllm.SamplingParams = lambda **given: types.SimpleNamespace(**given)
    vllm.sampling_params = types.ModuleType("vllm.sampling_params")
    vllm.sampling_params.RequestOutputKind = types.SimpleNamespace(DELTA="delta")
    for module in (vllm, vllm.sampling_params):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    results = tmp_path / "results.json"
    job = Job("FLASH_ATTN", "auto", "model", str(results), tuple(group.name for group in GROUPS), steps=5)
    vllm_child.run(job)
    found = {one["shape"]: one for one in json.loads(results.read_text())["shapes"]}
    assert [*found] == [shape.name for group in GROUPS for shape in group.shapes]
    assert all(one["steps"] == 5 for one in found.values()) and not engine.left
    assert 32700 < found["4 x 32.8K"]["mean_context"] < 33400
    vllm_child.run(Job("FLASH_ATTN", "auto", "model", str(results), ("120K",), steps=5, seconds=-1))
    assert json.loads(results.read_text())["shapes"] == []  # out of time


def _rows(tokens: list[int], tops: list[dict[int, float]]) -> list[dict]:
    return [{"tokens": tokens, "top": tops}]


def test_tokens_that_part_at_ties_agree() -> None:
    tops = [{1: -0.1, 2: -3.0}, {5: -0.70, 6: -0.71}, {9: 0.0}]
    theirs = _rows([1, 5, 9], tops)
    same = compare(_rows([1, 5, 9], [{1: -0.15}, *tops[1:]]), theirs)
    assert (same.compared, same.parted) == (3, ()) and same.within(0) and same.largest_difference == pytest.approx(0.05)
    tie = compare(_rows([1, 6, 7], tops), theirs)
    assert tie.compared == 1 and tie.within(0.02) and not tie.within(0.005)
    assert not compare(_rows([2, 5, 9], tops), theirs).within(1.0)
    assert not compare(_rows([4, 5, 9], tops), theirs).within(99)  # not among its likely ones
    back = json.loads(json.dumps(theirs))  # whose keys are text
    assert compare(theirs, back) == compare(back, theirs) == compare(theirs, theirs)


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
