"""examples/bench_serve.py --soak: all requests end whenever it is stopped, and what happened so far is told."""
from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest
from stub_runner import StubRunner

torch = pytest.importorskip("torch")
import bench_serve  # noqa: E402
from serve_bench import interrupts, page, presets, soak  # noqa: E402

from gpu.serve.model.config import find_config  # noqa: E402
from gpu.serve.server import Server  # noqa: E402
from pkvsim.memory.prefix_cache import KINDS  # noqa: E402
from pkvsim.serving.state import Limits  # noqa: E402

PAGES = 100


@pytest.fixture
def llm(monkeypatch):
    monkeypatch.setattr(soak, "BURST", 20)
    limits = Limits(16, PAGES, 1, 16, 512, KINDS.index("lru"))
    runner = StubRunner(max_batch=16, num_pages=PAGES, page_size=16, max_pages=64, vocab_size=5000)
    server = Server(runner, limits, max_context=1024, vocab_size=5000, eos_token_ids=(3,))
    return SimpleNamespace(server=server, config=SimpleNamespace(vocab_size=5000))


def test_a_whole_soak_goes_beyond_memory(llm):
    result = soak.soak(llm, 90)
    assert result.requests == result.asked == sum(result.ended.values()) == 90 and result.sound
    assert set(result.ended) == {"served", "refused", "cancelled"}
    assert result.preemptions and result.tokens and not result.lost_pages and not result.cut_short
    assert "CUT SHORT" not in str(result) and "peaks grew by" in str(result)


@pytest.mark.parametrize("asked", [0, 1, 2, 30, 55, 100])
def test_one_that_is_stopped_ends_all_that_came(llm, asked):
    times = 0

    def stopped():
        nonlocal times
        times += 1
        return times > asked

    result = soak.soak(llm, 2000, stopped=stopped)
    assert result.cut_short and result.sound and not llm.server.has_work and not result.lost_pages
    assert result.requests == sum(result.ended.values()) < result.asked == 2000
    assert result.cancelled_at_cut <= result.ended.get("cancelled", 0) and (asked == 0) == (result.requests == 0)
    assert str(result).startswith(f"CUT SHORT after {result.requests} of 2,000 requests, of which")
    assert result.growth_bytes is None and "peaks not compared" in str(result)


def test_lost_pages_and_growth_are_unsound(llm, monkeypatch):
    peaks = iter([(0, 0), (soak.SLACK_BYTES + 1, 0)])
    monkeypatch.setattr(soak, "_peaks", lambda: next(peaks))
    assert not soak.soak(llm, 20).sound
    monkeypatch.setattr(soak, "_peaks", lambda: (0, 0))
    monkeypatch.setattr(Server, "num_free_pages", property(lambda self: PAGES - 2))
    result = soak.soak(llm, 20)
    assert result.lost_pages == 2 and not result.sound


def test_signals_are_told_once_and_handlers_come_back(monkeypatch):
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with interrupts.until_interrupted() as stopped:
        assert not stopped()
        for _ in range(2):  # as timeout(1) sends it
            os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        monkeypatch.setattr(interrupts, "REPEAT_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 1)  # a place where the handler runs
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_the_script_tells_what_happened_before_an_interrupt(tmp_path, monkeypatch, capsys):
    """From the options to the page, by a model of random weights on the CPU."""
    config = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "intermediate_size": 32,
              "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1,
              "vocab_size": 50, "max_position_embeddings": 2048}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setitem(presets.SHAPES, presets.SOAKED, str(path))
    monkeypatch.setattr(soak, "BURST", 8)
    step, steps = Server.step, 0

    def interrupted(self):
        nonlocal steps
        steps += 1
        if steps == 40:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Server, "step", interrupted)
    args = bench_serve.parse_args(["--soak", "4000"])
    console = SimpleNamespace(is_terminal=False, print=lambda line, **_: print(line))
    found = bench_serve.soak_model(args, console)
    assert found["cut_short"] and found["sound"] and found["model"] == "small" and found["prefill"] == "torch"
    assert 0 < found["requests"] == sum(found["ended"].values()) < 4000
    out = capsys.readouterr().out
    assert "800 KV pages" in out and "CUT SHORT after" in out
    document = tmp_path / "soak.json"
    document.write_text(json.dumps(found), encoding="utf-8")
    page.write(tmp_path / "page.md", [document])
    assert f"{found['requests']} of 4,000, cut short" in (tmp_path / "page.md").read_text(encoding="utf-8")


def test_the_shape_that_is_soaked_has_what_flashinfer_packs():
    config = find_config(presets.SHAPES[presets.SOAKED])
    assert (config.name, config.head_dim, config.num_layers) == (presets.SOAKED, 128, 28)
