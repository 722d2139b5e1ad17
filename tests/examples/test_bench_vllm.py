"""bench_vllm without vLLM: its jobs and tables, agreement of tokens, and what a process that fails leaves."""
from __future__ import annotations

import io
import json
import os

import bench_vllm
import numpy as np
import pytest
from bench.vllm_cases import CAPTURED, GROUPS, LLAMA_8B, Job, engine_arguments, environment, write_model, write_plugin
from bench.vllm_report import compare, times_table
from rich.console import Console
from serving.gguf_to_hf import halves, hf_name, token_ids


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
