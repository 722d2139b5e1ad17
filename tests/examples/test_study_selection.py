"""examples/study_selection.py on a tiny random Llama: its decode steps, choosers, evictions and tables."""
from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from study import choosers, evictions, judge  # noqa: E402
from study.llama import Llama  # noqa: E402
from study.texts import Context, Needle  # noqa: E402

from pkvsim.selection.evictions import METHODS  # noqa: E402

LAYERS, HEADS, KV_HEADS, DIM, WORDS = 4, 4, 2, 8, 50
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Llama:
    generator = torch.Generator().manual_seed(0)
    made = object.__new__(Llama)
    made.device, made.dtype, made.layers, made.heads, made.kv_heads, made.head_dim = (
        "cpu", torch.float32, LAYERS, HEADS, KV_HEADS, DIM)  # fmt: skip
    made.eps, made.theta = 1e-5, 1e4
    width = HEADS * DIM
    shapes = {"token_embd.weight": (WORDS, width), "output_norm.weight": (width,)}
    for layer in range(LAYERS):
        own = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_output": (width, width),
               "attn_k": (KV_HEADS * DIM, width), "attn_v": (KV_HEADS * DIM, width), "ffn_gate": (48, width),
               "ffn_up": (48, width), "ffn_down": (width, 48)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in own.items()}
    made.weights = {name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 1)
                    for name, shape in shapes.items()}
    return made


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, WORDS, count).tolist()


def test_decode_steps_continue_a_prefill(model) -> None:
    tokens = ids(90)
    whole, _ = model.prefill(tokens, 0)
    _, cache = model.prefill(tokens[:80], 10)
    logits = judge.steps(model, cache, tokens[80:], None)
    torch.testing.assert_close(logits[-1], whole, atol=1e-4, rtol=1e-4)
    assert cache.length == 80


def test_a_whole_budget_is_dense_and_the_oracle_wins(model) -> None:
    context = Context(ids(700, 1), ids(4, 2))
    methods = ("oracle", "mean_std", "mean_std_8bit", "quest", "quest_softmax", "kascade", "twilight", "streaming_llm",
               "random")  # fmt: skip
    found = judge.summary(judge.retrieval(model, context, methods, (0.2, 1.0)))
    for method in methods:
        if method != "twilight":  # which reads less than it may
            assert abs(found["retrieval", method, 1.0]) < 1e-6, method
    assert found["retrieval", "oracle", 0.2] <= found["retrieval", "random", 0.2]


def test_evictions_keep_their_budget(model) -> None:
    tokens = ids(200, 3)
    _, cache = model.prefill(tokens, 4)
    for method in METHODS:
        kept = evictions.kept_tokens(method, model, cache, 0.3)
        sizes = [len(own) for layer in kept for own in layer]
        assert sum(sizes) == 60 * KV_HEADS * LAYERS, method
        assert all((np.diff(own) > 0).all() and own[-1] < 200 for layer in kept for own in layer)
    everything = evictions.Kept([[np.arange(200)] * KV_HEADS] * LAYERS, 200, "cpu")
    dense, other = (judge.steps(model, cache, ids(3, 4), choose)[-1] for choose in (None, everything))
    assert judge.kl_nats(dense, other) < 1e-6


def test_tables_show_every_method(model, capsys) -> None:
    import study_selection
    from rich.console import Console

    needle = Needle(ids(150, 5), ids(5, 6), ids(2, 7))
    findings = judge.retrieval(model, Context(ids(150, 8), ids(2, 9)), ("oracle", "quest"), (0.5,))
    findings += judge.find_needle(model, needle, ("oracle",), ("snapkv", "tova"), (0.5,), (0.5,))
    for table in study_selection.tables(findings):
        table.print(Console(width=150))
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("quest", "snapkv", "tova", "dense", "50 %"))
    with pytest.raises(SystemExit):
        study_selection.parse_args(["--shortest", "9000", "--longest", "100"])


def test_choosers_summarise_as_the_rules_do() -> None:
    from pkvsim.selection.summaries import row_summaries

    keys = torch.randn(2, 37, 8, dtype=torch.float64)
    for kind in ("mean_std", "min_max"):
        found = choosers.summarize(keys, 16, kind)
        for head in range(2):
            np.testing.assert_allclose(found[head].numpy(), row_summaries(keys[head].numpy(), 16, kind), atol=1e-12)
        assert float((choosers.in_8_bits(found) - found).abs().max()) <= float(found.abs().max()) / 127
