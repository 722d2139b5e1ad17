"""examples/generate.py without a GPU: options, --help, what is missing, and the comparison of tokens."""
from __future__ import annotations

import generate
import pytest
import without_gpu
from bench.generate_ways import WAYS, compare


def test_help_and_a_machine_without_a_gpu() -> None:
    done = without_gpu.run_main("generate")
    missing = "generate needs a CUDA GPU with CuPy, PyTorch and Transformers; torch is not installed"
    assert "--model" in done.stdout and done.stderr.startswith(missing)


@pytest.mark.parametrize("words, said", [
    ("--ways pkv,flash", "--ways: expected some of sdpa, pkv, paged|sdpa, paged|pkv_flash_2, got 'flash'"),
    ("--rows 0", "--rows: expected at least 1, got 0"), ("--prompts 0 5", "--prompts: expected at least 1, got 0"),
    ("--prompts 9 5", "--prompts: expected LEAST <= MOST, got 9 5"), ("--model nowhere", "--model: expected a folder"),
])
def test_wrong_options_are_named(words, said, capsys) -> None:
    with pytest.raises(SystemExit):
        generate.parse_args(words.split())
    assert said in capsys.readouterr().err
    assert generate.parse_args([]).ways == list(WAYS)


def test_rows_may_part_only_where_rounding_decides() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    expected = torch.tensor([[1, 2, 3]] * 4)
    found = torch.tensor([[1, 2, 3], [1, 0, 0], [1, 4, 3], [0, 2, 3]])
    logits = torch.tensor([[0.0, 5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.99], [0.0, 0.0, 0.0, 1.0, 0.0]])
    agreement = compare(found, expected, lambda row: logits, 0.05)
    assert (agreement.same_rows, agreement.near_ties, agreement.wrong) == (1, 1, ((1, 1), (3, 0)))
    with pytest.raises(ValueError):
        compare(found[:, :2], expected, lambda row: logits, 0.05)


def test_a_small_batch_on_the_cpu() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tiny_models import make_model
    from torch_paged import serve_op_on_cpu

    serve_op_on_cpu()
    model = make_model("llama")
    args = generate.parse_args("--rows 3 --prompts 2 9 --new-tokens 6".split())
    batch = generate.random_batch(model, args)
    assert [len(prompt) for prompt in batch.prompts()] == batch.attention_mask.sum(1).tolist()
    records = generate.run_all(model, batch, ["pkv"], page_size=4, tolerance=0.0)
    assert [record["way"] for record in records] == ["sdpa", "pkv"]
    for record in records:
        assert record["same_rows"] == 3 and not record["wrong"] and record["tokens_per_s"] > 0
    from rich.console import Console

    with Console(record=True, width=140) as console:
        generate.print_records(records, batch, console)
    assert "pkv" in console.export_text()
    model.set_attn_implementation("sdpa")
    tokens = model.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=6, do_sample=False)
    logits = torch.stack([generate.reference_logits(model, batch, tokens[:, -6:], row) for row in range(3)])
    assert torch.equal(logits.argmax(-1), tokens[:, -6:])
