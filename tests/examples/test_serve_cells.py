"""examples/bench_serve.py: every cell is measured or left out with a reason; sizes that the cells ask for hold them."""
from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from stub_runner import StubRunner

torch = pytest.importorskip("torch")
import bench_serve  # noqa: E402
from serve_bench import roofline  # noqa: E402

from gpu.serve.llm import LLM, ServeOptions, pages_with_reserve, reserve  # noqa: E402
from gpu.serve.server import Server  # noqa: E402
from pkvsim.memory.prefix_cache import KINDS  # noqa: E402
from pkvsim.serving.state import Limits  # noqa: E402

CONFIG = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1, "vocab_size": 50,
          "max_position_embeddings": 512}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(path)


def stub_llm(*, num_pages: int, max_batch: int, max_context: int, step_tokens: int, page_size: int = 16):
    """An LLM without a model, as far as cells ask it."""
    limits = Limits(page_size, num_pages, reserve(num_pages), max_batch, step_tokens, KINDS.index("none"))
    runner = StubRunner(max_batch=max_batch, num_pages=num_pages, page_size=page_size,
                        max_pages=-(-max_context // page_size), vocab_size=50)
    server = Server(runner, limits, max_context=max_context, vocab_size=50, record=True)
    return SimpleNamespace(server=server, config=SimpleNamespace(vocab_size=50, name="stub"),
                           options=SimpleNamespace(step_tokens=step_tokens))


@given(st.integers(1, 1 << 24))
def test_the_reserve_comes_on_top_of_what_requests_may_use(used):
    pages = pages_with_reserve(used)
    assert pages - reserve(pages) >= used > pages - 1 - reserve(pages - 1)


@pytest.mark.parametrize("cells", [[(8, 32768)], [(1, 1024), (128, 1024), (1, 32768), (8, 32768)]])
def test_a_pool_for_all_that_rows_could_use_holds_every_cell(cells):
    step_tokens, rows = bench_serve.CELL_STEP_TOKENS, max(rows for rows, _ in cells)
    longest = roofline.longest(cells, 100, step_tokens=step_tokens)
    # What LLM takes where memory has room for more than the rows could use.
    llm = stub_llm(num_pages=min(40_000, pages_with_reserve(-(-longest // 16) * rows)), max_batch=rows,
                   max_context=longest, step_tokens=step_tokens)
    assert [roofline.lacks_room(llm, *cell, 100) for cell in cells] == [None] * len(cells)
    roofline.fill(llm, *cells[-1], 100)
    assert llm.server.steps[-1].decode_rows == cells[-1][0]
    for _ in range(100):
        llm.server.step()
        assert llm.server.steps[-1].decode_rows == cells[-1][0]
    roofline.drain(llm.server)
    assert not llm.server.has_work


@given(cells=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 120)), min_size=1, max_size=4),
       steps=st.integers(2, 30), step_tokens=st.integers(16, 64), pages=st.integers(4, 400))
def test_a_cell_that_is_not_left_out_decodes_for_as_long_as_asked(cells, steps, step_tokens, pages):
    rows = max(rows for rows, _ in cells)
    longest = roofline.longest(cells, steps, step_tokens=step_tokens)
    llm = stub_llm(num_pages=pages, max_batch=rows, max_context=min(longest, pages * 4), step_tokens=step_tokens,
                   page_size=4)
    for count, context in cells:
        if roofline.lacks_room(llm, count, context, steps) is None:
            roofline.fill(llm, count, context, steps)
            llm.server.steps.clear()
            while len(llm.server.steps) < steps + roofline.SKIPPED:
                llm.server.step()
            assert {step.decode_rows for step in llm.server.steps[: steps + roofline.SKIPPED]} == {count}
            roofline.drain(llm.server)


def test_a_refused_row_is_an_error_and_leaves_no_request():
    llm = stub_llm(num_pages=500, max_batch=4, max_context=100, step_tokens=64)
    assert "at most 100" in roofline.lacks_room(llm, 4, 200, 10)
    with pytest.raises(roofline.CellError, match=r"expected 4 rows to decode at once, got at most 0: request 0 was "
                                                 r"refused \(prompt: expected at most 100 tokens with its output, got"):
        roofline.fill(llm, 4, 200, 10)
    assert not llm.server.has_work and llm.server.num_free_pages == 500
    roofline.fill(llm, 4, 20, 10)  # the next cell is as if there had been none before


def test_rows_that_memory_does_not_hold_together_are_an_error():
    llm = stub_llm(num_pages=30, max_batch=4, max_context=200, step_tokens=64)
    assert "KV pages, of which there are 30 " in roofline.lacks_room(llm, 4, 128, 10)
    with pytest.raises(roofline.CellError, match=r"got at most [1-3]: request \d was served \(length\) after (\d+) of \1 "):
        roofline.fill(llm, 4, 128, 10)
    assert not llm.server.has_work and llm.server.num_free_pages == 30


def test_a_row_that_ends_before_all_decode_is_an_error(monkeypatch):
    llm = stub_llm(num_pages=500, max_batch=4, max_context=400, step_tokens=64)
    monkeypatch.setattr(roofline, "new_tokens", lambda *args, **options: 3)
    with pytest.raises(roofline.CellError, match=r"expected 4 rows .* request 0 was served \(length\) after 3 of 3 tokens"):
        roofline.fill(llm, 4, 300, 10)


def test_the_models_pool_has_the_reserve_beside_its_requests(model):
    llm = LLM(model, ServeOptions(device="cpu", dummy_weights=True, max_context=320, max_batch=8, step_tokens=64))
    assert llm.pages.num_pages == pages_with_reserve(8 * 20) == 161


def test_the_script_measures_what_it_can_and_names_the_rest(model, monkeypatch, capsys):
    monkeypatch.setattr(bench_serve, "CELL_STEP_TOKENS", 64)
    fill = roofline.fill

    def filled(llm, rows, context, steps):
        if rows == 3:
            raise roofline.CellError("expected 3 rows")
        fill(llm, rows, context, steps)

    monkeypatch.setattr(roofline, "fill", filled)
    args = bench_serve.parse_args(["--model", model, "--cells", "2x40,3x20,1x600,4x90", "--steps", "3", "--rate", "100"])
    found = bench_serve.measure(args, Console())
    assert [(cell["rows"], cell["context"], cell["steps"]) for cell in found["cells"]] == [(2, 40, 3), (4, 90, 3)]
    assert found["left_out"]["3x20"] == "expected 3 rows"
    assert "small is served with at most 512" in found["left_out"]["1x600"]
    assert "left out 1 x 600: " in capsys.readouterr().out


def test_a_step_alone_is_not_asked_for(capsys):
    with pytest.raises(SystemExit):
        bench_serve.parse_args(["--steps", "1"])
    assert "--steps: expected at least 2" in capsys.readouterr().err
