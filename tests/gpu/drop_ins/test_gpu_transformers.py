"""Models in half precision under "pkv" against Transformers' SDPA, on the GPU."""
from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
import generate  # noqa: E402
from bench.generate_ways import Batch, compare, reference_logits  # noqa: E402
from generate import NEAR_TIE  # noqa: E402
from tiny_models import FAMILIES, make_model, prompts  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from gpu.drop_ins.transformers_attention import register  # noqa: E402
from gpu.drop_ins.transformers_cache import PagedCache  # noqa: E402
from pkvsim.schedule.prefixes import SharingRule  # noqa: E402

register()
LENS = [211, 2, 90, 1, 64, 17]


@pytest.mark.parametrize("dtype", NEAR_TIE)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_tokens(family: str, dtype: str) -> None:
    model = make_model(family, head_dim=64, dtype=getattr(torch, dtype), device="cuda")
    inputs, new_tokens = prompts(LENS, "left", device="cuda"), 40
    model.set_attn_implementation("sdpa")
    expected = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[:, max(LENS):]
    model.set_attn_implementation("pkv")
    cache = PagedCache(model.config, max_batch_size=len(LENS), max_seq_len=256)
    batch = Batch(inputs["input_ids"], inputs["attention_mask"], new_tokens)
    for _ in range(2):  # the second on pages that were used
        model.set_attn_implementation("pkv")
        found = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, past_key_values=cache)
        found = found[:, max(LENS):]
        assert not compare(found, expected, partial(reference_logits, model, batch, expected), NEAR_TIE[dtype]).wrong
        cache.reset()


@pytest.mark.parametrize("family, window, padding", [
    *(("llama", None, padding) for padding in ("left", "right", "both", "holes")), ("mistral", 50, "left"),
])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_logits_step_by_step_on_the_same_tokens(family: str, window: int | None, padding: str, head_dim: int) -> None:
    """Prefill, decode steps, several tokens on a cache that is not empty, decode steps again."""
    options = {} if window is None else {"sliding_window": window}
    model = make_model(family, head_dim=head_dim, dtype=torch.float16, device="cuda", **options)
    inputs = prompts(LENS, padding, device="cuda")
    mask, generator = inputs["attention_mask"], torch.Generator().manual_seed(3)
    caches = {"sdpa": DynamicCache(config=model.config),
              "pkv": PagedCache(model.config, max_batch_size=len(LENS), max_seq_len=300, page_size=16)}
    ids = inputs["input_ids"]
    for tokens in (1, 1, 1, 5, 1, 1, 30, 1, 0):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        logits = {}
        for way, cache in caches.items():
            model.set_attn_implementation(way)
            with torch.no_grad():
                logits[way] = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        kept = mask[:, -ids.shape[1]:].bool()
        torch.testing.assert_close(logits["pkv"][kept], logits["sdpa"][kept], rtol=0.02, atol=0.05)
        ids = torch.randint(2, 97, (len(LENS), tokens), generator=generator).cuda()
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    assert caches["pkv"].rows.lens.tolist() == [length + 41 for length in LENS]


@pytest.mark.parametrize("family, window", [("gemma2", 50), ("gpt_oss", 50), ("gemma2", 400), ("gpt_oss", 400)])
def test_soft_caps_and_sinks_on_the_same_tokens(family: str, window: int) -> None:
    """Gemma 2 caps its logits, GPT-OSS has sinks, and both slide in every other layer: as close to the same weights in
    float32 as Transformers' eager attention is, whose softmax is rounded to 16 bits.

    All experts take part in every token: a router's near tie, which rounding decides, would change a whole layer.
    """
    options = {"gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 64},
               "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 4}}[family]
    model = make_model(family, head_dim=64, dtype=torch.float16, device="cuda", sliding_window=window, **options)
    exact = copy.deepcopy(model).float()
    exact.set_attn_implementation("eager")
    inputs, generator = prompts(LENS, "left", device="cuda"), torch.Generator().manual_seed(3)
    caches = {"exact": DynamicCache(config=model.config), "eager": DynamicCache(config=model.config),
              "pkv": PagedCache(model.config, max_batch_size=len(LENS), max_seq_len=300, page_size=16)}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for tokens in (1, 1, 5, 1, 0):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        kept, logits = mask[:, -ids.shape[1]:].bool(), {}
        for way, cache in caches.items():
            one = exact if way == "exact" else model
            if way != "exact":
                model.set_attn_implementation(way)
            with torch.no_grad():
                found = one(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
            logits[way] = found[kept].float()
        error = {way: float((logits[way] - logits["exact"]).abs().max()) for way in ("eager", "pkv")}
        assert error["pkv"] <= 0.02 + 1.5 * error["eager"] and error["eager"] < 0.3
        ids = torch.randint(2, 97, (len(LENS), tokens), generator=generator).cuda()
        mask = torch.cat([mask, torch.ones_like(ids)], 1)


@pytest.mark.parametrize("dtype", NEAR_TIE)
@pytest.mark.parametrize("told", [True, False])
def test_answers_to_one_prompt_share_its_pages(told: bool, dtype: str) -> None:
    """Greedy, so that every answer must be the one that the prompt alone has; the shared pages are read once."""
    model = make_model("llama", head_dim=64, dtype=getattr(torch, dtype), device="cuda")
    inputs, each, new_tokens = prompts(LENS, "left", device="cuda"), 5, 40
    inputs = {name: array.repeat_interleave(each, 0) for name, array in inputs.items()}
    model.set_attn_implementation("sdpa")
    expected = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[:, max(LENS):]
    model.set_attn_implementation("pkv")
    rows = each * len(LENS)
    cache = PagedCache(model.config, max_batch_size=rows, max_seq_len=256, rows_per_prompt=each if told else 1)
    cache.rows.rule = SharingRule(0, 0)
    found = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, past_key_values=cache)[:, max(LENS):]
    assert (cache.rows.groups is not None) == told
    batch = Batch(inputs["input_ids"], inputs["attention_mask"], new_tokens)
    assert not compare(found, expected, partial(reference_logits, model, batch, expected), NEAR_TIE[dtype]).wrong


def test_beams_over_shared_pages() -> None:
    """As the same beams over pages of their own; scores of random logits lie far apart."""
    model = make_model("qwen3", head_dim=64, dtype=torch.float16, device="cuda")
    inputs, beams = prompts(LENS, "left", device="cuda"), 4
    model.set_attn_implementation("sdpa")
    options = {"max_new_tokens": 20, "do_sample": False, "num_beams": beams, "return_dict_in_generate": True,
               "output_scores": True}
    expected = model.generate(**inputs, **options).sequences_scores
    model.set_attn_implementation("pkv")
    for rows_per_prompt in (1, beams):
        cache = PagedCache(model.config, max_batch_size=beams * len(LENS), max_seq_len=256,
                           rows_per_prompt=rows_per_prompt)
        cache.rows.rule = SharingRule(0, 0)
        found = model.generate(**inputs, **options, past_key_values=cache).sequences_scores
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_decode_steps_never_wait_for_the_gpu() -> None:
    model = make_model("qwen3", head_dim=64, dtype=torch.bfloat16, device="cuda")
    inputs = prompts(LENS, "left", device="cuda")
    model.set_attn_implementation("pkv")
    cache = PagedCache(model.config, max_batch_size=len(LENS), max_seq_len=300)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        mask, ids = inputs["attention_mask"], torch.full((len(LENS), 1), 5, device="cuda")
        masks = [torch.cat([mask, mask.new_ones(len(LENS), n)], 1) for n in range(1, 40)]
        position = mask.sum(1, keepdim=True)
        model(ids, attention_mask=masks[0], position_ids=position, past_key_values=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for n, wider in enumerate(masks[1:], 1):
                model(ids, attention_mask=wider, position_ids=position + n, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.rows.lens.tolist() == [length + 39 for length in LENS]


def test_float32_models_are_refused_by_name() -> None:
    model, inputs = make_model("llama", head_dim=64, device="cuda"), prompts([9, 3], "left", device="cuda")
    model.set_attn_implementation("pkv")
    cache = PagedCache(model.config, max_batch_size=2, max_seq_len=40)
    with pytest.raises(ValueError, match="^dtype: expected"):
        model.generate(**inputs, max_new_tokens=3, do_sample=False, past_key_values=cache)


def test_the_example_runs(tmp_path: Path) -> None:
    path = tmp_path / "generate.json"
    words = f"--rows 4 --prompts 20 200 --new-tokens 12 --ways sdpa,pkv --json {path}"
    assert generate.main(words.split()) == 0
    document = json.loads(path.read_text())
    assert [record["way"] for record in document["results"]] == ["sdpa", "pkv"]
