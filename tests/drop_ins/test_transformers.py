"""Models under "pkv" with a PagedCache do as under Transformers' own attention; on the CPU, in float32."""
from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from paged_generation import cache_for, generate
from readme import README
from tiny_models import FAMILIES, make_model, prompts
from torch_paged import serve_op_on_cpu
from transformers import DynamicCache

from gpu.drop_ins.transformers_attention import attention, register
from gpu.drop_ins.transformers_cache import PagedCache
from gpu.drop_ins.transformers_rows import PagedRows
from pkvsim.schedule.prefixes import SharingRule

serve_op_on_cpu()
register()
MODELS = {family: make_model(family) for family in FAMILIES}
LENS = st.lists(st.integers(1, 13), min_size=1, max_size=4)


@pytest.mark.parametrize("padding", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_tokens(family, padding) -> None:
    model, inputs = MODELS[family], prompts([11, 2, 7, 1], padding)
    cache = cache_for(model, inputs)
    found = generate(model, inputs, "pkv", **cache.argument_of(model))
    for implementation in ("sdpa", "eager"):
        assert torch.equal(found, generate(model, inputs, implementation))
    assert len(found.unique()) > 5, "a model that repeats itself would hide errors"
    assert cache.rows.lens.tolist() == [11 + 11, 2 + 11, 7 + 11, 1 + 11]  # the last token is not stored
    cache.reset()
    assert torch.equal(found, generate(model, inputs, "pkv", **cache.argument_of(model)))


@settings(deadline=None, max_examples=25)
@given(turns=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2**31)), min_size=1, max_size=5),
       rows=st.integers(1, 3), page_size=st.sampled_from([1, 4, 16]))
def test_logits_of_turn_after_turn_under_any_mask(turns, rows, page_size) -> None:
    """Turns of one or many tokens, any of them padding, against SDPA on a dynamic cache with the same masks."""
    model, caches = MODELS["llama"], {}
    caches["sdpa"] = DynamicCache(config=model.config)
    caches["pkv"] = PagedCache(model.config, max_batch_size=rows, max_seq_len=30, page_size=page_size)
    mask = torch.zeros((rows, 0), dtype=torch.long)
    for tokens, seed in turns:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, 97, (rows, tokens), generator=generator)
        new = torch.randint(0, 3, (rows, tokens), generator=generator).clamp(max=1)
        new[:, 0] |= int(mask.shape[1] == 0)  # a query that sees nothing has no right answer
        mask = torch.cat([mask, new], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        logits = {}
        for implementation, cache in caches.items():
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                found = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            logits[implementation] = found.logits
        kept = new.bool()
        torch.testing.assert_close(logits["pkv"][kept], logits["sdpa"][kept], rtol=1e-4, atol=1e-4)
    assert caches["pkv"].rows.lens.tolist() == mask.sum(1).tolist()
    assert caches["pkv"].get_seq_length() == mask.shape[1]


def test_a_prompt_without_a_mask_and_one_of_a_single_token() -> None:
    model = MODELS["qwen3"]
    for width in (9, 1):
        ids = prompts([width, width], "left")["input_ids"]
        cache = PagedCache(model.config, max_batch_size=2, max_seq_len=40)
        model.set_attn_implementation("pkv")
        found = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache)
        model.set_attn_implementation("sdpa")
        assert torch.equal(found, model.generate(ids, max_new_tokens=8, do_sample=False))


def test_rows_that_end_early() -> None:
    model, inputs = MODELS["llama"], prompts([11, 2, 7, 5], "left")
    free = generate(model, inputs, "sdpa")
    options = {"eos_token_id": free[0, 14].item(), "pad_token_id": 0}
    expected = generate(model, inputs, "sdpa", **options)
    assert not torch.equal(expected, free[:, :expected.shape[1]])
    assert torch.equal(expected, generate(model, inputs, "pkv", **cache_for(model, inputs).argument_of(model),
                                         **options))


def test_forward_without_a_cache() -> None:
    model, inputs = MODELS["mistral"], prompts([9, 4], "right")
    model.set_attn_implementation("pkv")
    found = model(**inputs, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, model(**inputs, use_cache=False).logits)


def test_pages_are_taken_as_rows_grow() -> None:
    model, inputs = MODELS["llama"], prompts([9, 1], "left")
    cache = cache_for(model, inputs, num_pages=20)
    generate(model, inputs, "pkv", **cache.argument_of(model), new_tokens=1)
    assert cache.num_free_pages == 20 - 3 - 1
    cache.reset()
    generate(model, inputs, "pkv", **cache.argument_of(model), new_tokens=9)
    assert cache.num_free_pages == 20 - 5 - 3


@pytest.mark.parametrize("options, name", [
    ({"max_batch_size": 1}, "max_batch_size"), ({"max_seq_len": 8}, "max_seq_len"),
    ({"max_seq_len": 12}, "max_seq_len"), ({"num_pages": 2}, "num_pages"),
])
def test_a_cache_that_is_too_small_says_so(options, name) -> None:
    model, inputs = MODELS["llama"], prompts([9, 3], "left")
    cache = PagedCache(model.config, **{"max_batch_size": 2, "max_seq_len": 30, "page_size": 4, **options})
    with pytest.raises(ValueError, match=name):
        generate(model, inputs, "pkv", **cache.argument_of(model))


def test_other_caches_and_other_batches_are_refused() -> None:
    model, inputs = MODELS["llama"], prompts([9, 3], "left")
    with pytest.raises(ValueError, match="^past_key_values: expected a gpu.drop_ins.transformers_cache.PagedCache"):
        generate(model, inputs, "pkv")
    cache = cache_for(model, inputs)
    generate(model, inputs, "pkv", **cache.argument_of(model), new_tokens=3)
    with pytest.raises(ValueError, match="^past_key_values: expected its 2 rows"):
        model(torch.ones((1, 1), dtype=torch.long), past_key_values=cache)
    with pytest.raises(ValueError, match="^attention_mask: expected one mask"):
        model(torch.ones((2, 1), dtype=torch.long), past_key_values=cache, attention_mask=torch.ones(2, 1, 1, 5))
    cache = PagedCache(model.config, max_batch_size=4, max_seq_len=30, rows_per_prompt=2)
    with pytest.raises(ValueError, match=r"^rows_per_prompt: expected 2 neighbouring rows of one prompt, .* \[9, 3\]"):
        generate(model, inputs, "pkv", **cache.argument_of(model))
    cache = PagedCache(model.config, max_batch_size=4, max_seq_len=30, rows_per_prompt=3)
    with pytest.raises(ValueError, match="^rows_per_prompt: expected a batch of whole prompts of 3 rows"):
        generate(model, inputs, "pkv", **cache.argument_of(model))


EVERY = SharingRule(tokens_per_member=0, least_tokens=0)


@pytest.mark.parametrize("family, num_beams, told, padding", [
    ("llama", 3, True, "both"), ("llama", 3, False, "left"), ("mistral, windowed", 4, True, "left"),
    ("qwen3", 2, True, None)])
def test_beams_share_their_prompt(family, num_beams, told, padding) -> None:
    """As Transformers' own cache, which copies all of every row at each step; told: the cache knows of the beams."""
    model = make_model("mistral", sliding_window=6) if "," in family else MODELS[family]
    inputs = prompts([9, 3, 13] if padding else [12, 12], padding or "left")
    inputs = inputs if padding else {"input_ids": inputs["input_ids"]}
    expected = generate(model, inputs, "sdpa", num_beams=num_beams, num_return_sequences=2)
    rows = num_beams * len(inputs["input_ids"])
    cache = PagedCache(model.config, max_batch_size=rows, max_seq_len=30, page_size=4,
                       rows_per_prompt=num_beams if told else 1)
    cache.rows.rule = EVERY
    for _ in range(2):
        found = generate(model, inputs, "pkv", num_beams=num_beams, num_return_sequences=2, **cache.argument_of(model))
        assert torch.equal(found, expected)
        assert (cache.rows.groups is not None) == told
        cache.reset()


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_several_answers_to_a_prompt_share_its_pages(page_size) -> None:
    model, inputs = MODELS["qwen2"], prompts([9, 3, 20], "left")
    model.set_attn_implementation("sdpa")
    options = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 9}
    torch.manual_seed(5)
    expected = model.generate(**inputs, **options)
    model.set_attn_implementation("pkv")
    free = {}
    for rows_per_prompt in (1, 4):
        cache = PagedCache(model.config, max_batch_size=12, max_seq_len=40, page_size=page_size,
                           rows_per_prompt=rows_per_prompt)
        cache.rows.rule = EVERY
        torch.manual_seed(5)
        assert torch.equal(model.generate(**inputs, **options, **cache.argument_of(model)), expected)
        free[rows_per_prompt] = cache.num_free_pages
    assert free[4] - free[1] == 3 * sum(length // page_size for length in (9, 3, 20))
    cache.reset()
    assert cache.num_free_pages == 12 * -(-40 // page_size)


@pytest.mark.parametrize("argument, value", [
    ("dropout", 0.1), ("position_bias", torch.zeros(1)),
])
def test_what_is_not_served_is_refused_by_name(argument, value) -> None:
    new = torch.zeros(2, 6, 3, 8)
    with pytest.raises(NotImplementedError, match=f"^{argument}: expected") as refused:
        attention(torch.nn.Module(), new, new[:, :2], new[:, :2], None, **{argument: value})
    assert "tensor(" not in str(refused.value)


def test_readme_example() -> None:
    model, inputs = MODELS["qwen2"], prompts([9, 3], "left")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text().split("\n## Drop-ins\n", 1)[1], re.DOTALL)
    example = next(block for block in blocks if "generate" in block)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # the cache goes by the name that this Transformers takes
        exec(example.replace("model.generate", "found = model.generate"), names := {"model": model, "inputs": inputs})
    assert torch.equal(names["found"], generate(model, inputs, "sdpa", new_tokens=20))


def test_a_cache_after_a_failed_step_asks_for_a_reset() -> None:
    model, inputs = MODELS["llama"], prompts([9, 3], "left")
    cache = cache_for(model, inputs)
    layers = model.model.layers
    hook = layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        generate(model, inputs, "pkv", **cache.argument_of(model))
    hook.remove()
    with pytest.raises(RuntimeError, match="reset"):
        model(inputs["input_ids"][:, :1], past_key_values=cache)
    cache.reset()
    expected = generate(model, inputs, "sdpa")
    assert torch.equal(generate(model, inputs, "pkv", **cache.argument_of(model)), expected)


@settings(deadline=None, max_examples=60)
@given(lens=LENS, steps=st.integers(1, 20), page_size=st.sampled_from([1, 2, 16]))
def test_every_place_is_one_token_and_belongs_to_its_row(lens, steps, page_size) -> None:
    rows = PagedRows(max_batch_size=len(lens), max_seq_len=64, page_size=page_size, num_pages=64 * len(lens))
    kept = torch.arange(max(lens)) < torch.tensor(lens)[:, None]
    taken: list[tuple[int, int]] = []
    for step in range(steps + 1):
        new = kept if step == 0 else None
        rows.extend(new, len(lens), max(lens) if step == 0 else 1, torch.device("cpu"))
        for row, end in enumerate(rows.step.lens.tolist()):
            count = 1 if rows.step.offsets is None else int(rows.step.offsets.diff()[row])
            places = range(end - count, end)
            taken += [(int(rows.table[row, at // page_size]), at % page_size) for at in places]
    assert len(set(taken)) == len(taken) == sum(lens) + steps * len(lens)
    assert rows.lens.tolist() == [length + steps for length in lens]
    owned = {(int(rows.table[row, at // page_size]), at % page_size) for row, length in enumerate(rows.lens.tolist())
             for at in range(length)}
    assert owned == set(taken)
    assert rows.num_free_pages == 64 * len(lens) - int(np.sum(-(-rows.lens.numpy() // page_size)))
