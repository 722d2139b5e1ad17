"""examples/pool.py without a GPU: its options, and its session on a tiny model with pages in host memory."""
from __future__ import annotations

import pytest
import without_gpu

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
import pool as script  # noqa: E402
from pool_bench.session import Answer, largest_difference  # noqa: E402
from rich.console import Console  # noqa: E402
from tiny_models import make_model  # noqa: E402
from torch_paged import serve_op_on_cpu  # noqa: E402

from gpu.drop_ins.transformers_attention import register  # noqa: E402


def test_help_and_a_machine_without_a_gpu() -> None:
    assert "pool needs a CUDA GPU with CuPy and PyTorch" in without_gpu.run_main("pool").stderr


@pytest.mark.parametrize(("words", "said"), [
    ("--documents 0", "--documents: expected at least 1"), ("--tokens 3", "--tokens: expected at least 64"),
    ("--page-size 0", "--page-size: expected at least 1"),
    ("--tier host:1GiB:1 --directory /tmp", "--directory: expected only without --tier"),
])
def test_bad_options_are_named(words: str, said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        script.parse_args(words.split())
    assert said in capsys.readouterr().err


def test_documents_that_come_again_are_loaded(tmp_path, capsys: pytest.CaptureFixture) -> None:
    serve_op_on_cpu()
    register()
    model = make_model("llama")
    model.set_attn_implementation("pkv")
    words = "--documents 2 --tokens 64 --questions 4 --answer-tokens 2 --compare 3 --page-size 8".split()
    args = script.parse_args(words)
    tiers = script.default_tiers(args, model, tmp_path / "kv")
    found = script.session(model, args, tiers, pin=False)
    assert found["first"]["questions"] == 2 and found["again"]["questions"] == 2
    assert found["again"]["loaded_share"] > 0.6 and found["logits_differ_by"] < 1e-4
    assert found["pool"]["hits"] >= 2 * 8 and found["pool"]["disk"]["faults"] == 0
    for table in script.tables(found):
        table.print(Console(width=120))
    said = capsys.readouterr().out
    assert "with it, loaded" in said and "times sooner" in said and "Blocks of 3 KiB" in said
    again = script.session(model, args, tiers, pin=False)  # as another process: the disk kept a part of every document
    assert again["pool"]["stored"] < found["pool"]["stored"]


def test_two_arenas_of_host_memory_and_nothing_to_compare_with(capsys: pytest.CaptureFixture) -> None:
    serve_op_on_cpu()
    register()
    model = make_model("llama")
    model.set_attn_implementation("pkv")
    args = script.parse_args("--documents 2 --tokens 64 --questions 4 --answer-tokens 2 --compare 0 --page-size 8".split())
    found = script.session(model, args, ["host_a:1MiB:50", "host_b:1MiB:50"], pin=False)
    for table in script.tables(found):
        table.print(Console(width=120))
    said = capsys.readouterr().out
    assert "differ" not in said and "sooner" not in said and found["logits_differ_by"] is None
    row = next(line.split() for line in said.splitlines() if "host_a, host_b" in line)
    assert str(found["pool"]["hits"]) in row, "blocks of host memory count once"


def test_logits_that_are_no_numbers_do_not_agree() -> None:
    answers = [Answer(0, False, 0, 0.0, 0.0, (), logits) for logits in (torch.arange(4.0), torch.full((4,), torch.nan))]
    assert largest_difference(answers[:1] * 2, answers[:1] * 2) == 0
    assert largest_difference(answers, answers[:1] * 2) != largest_difference(answers, answers[:1] * 2)  # NaN
