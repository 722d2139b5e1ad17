"""A PagedCache whose prompts a press of kvpress evicts: what is kept is what the press keeps, and steps go on from it."""
from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from first_element_press import Press
from tiny_models import VOCABULARY, make_model
from torch_paged import serve_op_on_cpu
from transformers import DynamicCache

from gpu.drop_ins import kvpress_presses
from gpu.drop_ins.kvpress_presses import pressed
from gpu.drop_ins.transformers_attention import register
from gpu.drop_ins.transformers_cache import PagedCache

serve_op_on_cpu()
register()
MODELS = {family: make_model(family) for family in ("llama", "qwen3")}
PROMPT, LAYERS, KV_HEADS = 53, 3, 2
PACKAGED = ("KnormPress", "RandomPress", "SnapKVPress", "PyramidKVPress", "TOVAPress", "StreamingLLMPress",
            "ExpectedAttentionPress", "KeyDiffPress", "LagKVPress", "LeverageScorePress", "NonCausalAttnPress",
            "CompactorPress", "CURPress")  # fmt: skip


def packaged(name: str, ratio: float) -> object:
    """A press of the package; the test is skipped where it, or what it needs, is not installed."""
    kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed")
    windows = {"SnapKVPress": {"window_size": 8}, "PyramidKVPress": {"window_size": 4, "beta": 3},
               "ExpectedAttentionPress": {"n_future_positions": 16}, "LagKVPress": {"lag_size": 8},
               "NonCausalAttnPress": {"chunk_size": 16}}  # fmt: skip
    return getattr(kvpress, name)(compression_ratio=ratio, **windows.get(name, {}))


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def paged(model, rows: int, **options: object) -> PagedCache:
    model.set_attn_implementation("pkv")
    return PagedCache(model.config, max_batch_size=rows, max_seq_len=PROMPT + 20, **options)


@torch.no_grad()
def step(model, cache, tokens: torch.Tensor, begin: int) -> torch.Tensor:
    at = torch.arange(begin, begin + tokens.shape[1])[None].expand(len(tokens), -1)
    return model(tokens, past_key_values=cache, position_ids=at).logits


def by_the_press(press, model, prompts: torch.Tensor) -> DynamicCache:
    """Transformers' own cache of the prompts, cut by the press's compress() as the package's hook does."""
    cache = DynamicCache(config=model.config)

    def hook(module, inputs, kwargs, output):
        layer = cache.layers[module.layer_idx]
        layer.keys, layer.values = press.compress(
            module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs)  # fmt: skip

    press.forward_hook = hook
    model.set_attn_implementation("sdpa")
    torch.manual_seed(5)  # of presses that draw
    with press(model):
        step(model, cache, prompts, 0)
    del press.forward_hook
    return cache


def kept_keys(cache: PagedCache, layer: int) -> list[torch.Tensor]:
    """Keys of every lane, in the order of its pages."""
    own = cache.layers[layer]
    lengths = own.heads.lengths.reshape(-1)
    key, _, _ = own.heads.dense(own.keys, own.values, torch.zeros(len(lengths) // KV_HEADS, KV_HEADS, 1), 6)
    return [lane[:length] for lane, length in zip(key.flatten(0, 1), lengths.tolist())]


@pytest.mark.parametrize(("family", "name"), [
    *(("llama", name) for name in ("stub", *PACKAGED)), *(("qwen3", name) for name in ("stub", "SnapKVPress", "TOVAPress"))])
def test_pages_of_one_token_are_the_presss_own(family: str, name: str) -> None:
    """And a question and its answer read the same of them."""
    model, prompts, rows = MODELS[family], ids(2, PROMPT), 2
    press = Press(0.6) if name == "stub" else packaged(name, 0.6)
    want = by_the_press(press, model, prompts)
    cache = paged(model, rows, page_size=1)
    free = cache.rows.num_pages * KV_HEADS
    torch.manual_seed(5)
    with pressed(press, model, cache):
        step(model, cache, prompts, 0)
    for layer in range(LAYERS):
        for found, expected in zip(kept_keys(cache, layer), want.layers[layer].keys.flatten(0, 1), strict=True):
            assert len(found) == len(expected)
            distances = (found[:, None] - expected).abs().amax(-1)
            assert distances.min(1).values.max() < 1e-4 and distances.min(0).values.max() < 1e-4
        kept = int(cache.layers[layer].heads.lengths.sum())
        assert cache.layers[layer].heads.num_free_pages == free - kept and kept < rows * KV_HEADS * PROMPT
    if name == "PyramidKVPress":
        return  # Transformers' mask is of the first layer's tokens, of which the others have more or fewer
    for begin, tokens in ((PROMPT, ids(rows, 4, 1)), *((PROMPT + 4 + i, ids(rows, 1, 2 + i)) for i in range(3))):
        logits = {}
        for implementation, own in (("sdpa", want), ("pkv", cache)):
            model.set_attn_implementation(implementation)
            logits[implementation] = step(model, own, tokens, begin)
        torch.testing.assert_close(logits["pkv"], logits["sdpa"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("page_size", [4, 16])
def test_pages_of_the_largest_means(page_size: int) -> None:
    model, prompts, press = MODELS["llama"], ids(1, PROMPT), Press(0.5)
    cache, dense = paged(model, 1, page_size=page_size), DynamicCache(config=model.config)
    with pressed(press, model, cache):
        step(model, cache, prompts, 0)
    model.set_attn_implementation("sdpa")
    step(model, dense, prompts, 0)
    pages = -(-PROMPT // page_size)
    for layer in range(LAYERS):
        for head, found in enumerate(kept_keys(cache, layer)):
            keys = dense.layers[layer].keys[0, head]
            means = [float(keys[at : at + page_size, 0].mean()) for at in range(0, PROMPT, page_size)]
            best = sorted(sorted(range(pages), key=lambda page: -means[page])[: math.ceil(26 / page_size)])
            at = [token for page in best for token in range(page * page_size, min(PROMPT, (page + 1) * page_size))]
            torch.testing.assert_close(found, keys[at], rtol=1e-4, atol=1e-4)


def test_generate_goes_on_in_a_pool_too_small_for_the_whole() -> None:
    """Tokens after the prompt take pages that it gave back."""
    model, prompts = MODELS["llama"], ids(2, PROMPT)
    cache = paged(model, 2, page_size=4, num_pages=2 * 14)
    with pressed(Press(0.5), model, cache):
        step(model, cache, prompts, 0)
    assert cache.num_free_pages == 0 and all(layer.heads.num_free_pages == 2 * 28 - 28 for layer in cache.layers)
    question = torch.cat([prompts, ids(2, 3, 1)], dim=1)
    found = model.generate(question, max_new_tokens=12, do_sample=False, **cache.argument_of(model))
    assert found.shape == (2, PROMPT + 3 + 12) and (found[:, : PROMPT + 3] == question).all()
    lengths = cache.layers[0].heads.lengths
    assert all((layer.heads.lengths <= 28 + 14).all() for layer in cache.layers) and (lengths >= 25 + 14).all()
    cache.reset()
    with pressed(Press(0.0), model, cache):  # nothing goes
        step(model, cache, prompts, 0)
    assert all(layer.heads is None for layer in cache.layers) and cache.num_free_pages == 0
    with pytest.raises(ValueError, match="^num_pages: out of pages"):
        step(model, cache, ids(2, 4), PROMPT)


def test_evict_by_hand_and_what_it_refuses() -> None:
    """Rows of any lengths, heads that keep nothing, and padding in later steps."""
    model, mask = MODELS["llama"], torch.tensor([[0] * 10 + [1] * 20, [1] * 30])
    cache = paged(model, 2, page_size=4)
    with pytest.raises(ValueError, match="^kept: expected a layer with tokens"):
        cache.evict(0, [[[0], [0]]] * 2)
    with torch.no_grad():
        model(ids(2, 30), attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="^kept: expected places of 2 rows with 2 KV heads"):
        cache.evict(0, [[[0], [0]]])
    with pytest.raises(ValueError, match="^kept: expected places below a lane's"):
        cache.evict(0, [[[0], [5]], [[0], [0]]])
    with pytest.raises(ValueError, match="^kept: expected ascending places"):
        cache.evict(0, [[[1, 0], [4]], [[0], [0]]])
    gone = cache.evict(0, [[[0, 4], []], [[7], [0, 1, 2, 3, 4, 5, 6, 7]]])
    assert gone == 3 + 5 + 7 and cache.layers[0].heads.lengths.tolist() == [[8, 0], [2, 30]]
    before = cache.layers[0].keys.clone()
    more = torch.cat([mask, torch.tensor([[1, 0, 1], [0, 1, 0]])], dim=1)
    with torch.no_grad():
        model(ids(2, 3, 1), attention_mask=more, past_key_values=cache)
        model(ids(2, 1, 2), attention_mask=torch.cat([more, torch.tensor([[0], [1]])], 1), past_key_values=cache)
    assert cache.layers[0].heads.lens.tolist() == [10, 2, 4, 32]
    assert cache.rows.lens.tolist() == [22, 32]
    assert cache.evict(0, [[[0], [0]], [[0], [1, 7]]]) > 0 and cache.layers[0].heads.lengths.tolist() == [[4, 2], [4, 8]]
    changed = (cache.layers[0].keys != before).flatten(2).any(-1)
    assert int(changed.sum()) <= 2 * 2 + 4 + 1, "what is kept stays where it is"
    with pytest.raises(NotImplementedError, match="^reorder_cache"):
        cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    padded = torch.tensor([[0] * 3 + [1] * 7, [1] * 10])
    with pytest.raises(ValueError, match="^attention_mask: expected prompts without padding"), torch.no_grad():
        with pressed(Press(0.5), model, cache):
            model(ids(2, 10), attention_mask=padded, past_key_values=cache)
    with pytest.raises(ValueError, match="^press: expected a ScorerPress"):
        with pressed(object(), model, cache):
            pass
    several = paged(model, 2, rows_per_prompt=2)
    with pytest.raises(ValueError, match="^kept: expected a cache without"):
        several.evict(0, [])


def test_kept_pages_are_those_of_means() -> None:
    scores = torch.tensor([[[1.0, 1, 9, 0, 2, 2, 3]]])
    assert [own.tolist() for own in kvpress_presses.kept_pages(scores, 3, 2)[0]] == [[1, 3]]
    assert kvpress_presses.kept_pages(scores, 3, 1)[0][0].tolist() in ([2, 4, 6], [2, 5, 6])  # of equal ones, either
