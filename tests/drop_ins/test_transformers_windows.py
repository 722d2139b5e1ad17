"""Models with sliding windows, soft caps and sinks under "pkv" do as under Transformers' own attention; on the CPU."""
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from paged_generation import cache_for, generate
from tiny_models import make_model, prompts
from torch_paged import serve_op_on_cpu
from transformers import DynamicCache

from gpu.drop_ins.flash_attn import dense
from gpu.drop_ins.transformers_attention import register

serve_op_on_cpu()
register()
WINDOWED = {"mistral": make_model("mistral", sliding_window=6),
            "qwen2, some layers": make_model("qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=1)}


@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_windows(name) -> None:
    model, inputs = WINDOWED[name], prompts([11, 2, 7, 1], "left")
    expected = generate(model, inputs, "sdpa", new_tokens=20)
    assert torch.equal(generate(model, inputs, "pkv", new_tokens=20,
                                past_key_values=cache_for(model, inputs, new_tokens=20)), expected)


def logits_of(model, caches, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """By each attention with its cache, of the tokens of ids that the mask has."""
    found, own = {}, mask[:, -ids.shape[1]:]
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
    for implementation, cache in caches.items():
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        found[implementation] = out.logits[own.bool()]
    return found


@pytest.mark.parametrize("name", WINDOWED)
def test_turns_under_a_sliding_window(name) -> None:
    model, inputs = WINDOWED[name], prompts([11, 4], "left")
    caches = {"sdpa": DynamicCache(config=model.config), "pkv": cache_for(model, inputs, new_tokens=30)}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for tokens in (1, 4, 1, 9, 1):
        logits = logits_of(model, caches, ids, mask)
        torch.testing.assert_close(logits["pkv"], logits["sdpa"], rtol=1e-4, atol=1e-4)
        ids = torch.randint(2, 97, (2, tokens))
        mask = torch.cat([mask, torch.ones_like(ids)], 1)


OPTIONS = {"gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
           "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2}}
CAPPED = {(family, window): make_model(family, sliding_window=window, **options)
          for family, options in OPTIONS.items() for window in (6, 64)}


@pytest.mark.parametrize("padding, window, logits_at_a_time", [
    ("left", 6, 600), ("right", 64, 1 << 28), ("holes", 64, 600)])
@pytest.mark.parametrize("family", OPTIONS)
def test_soft_caps_and_sinks(family, padding, window, logits_at_a_time, monkeypatch) -> None:
    """Gemma 2 caps its logits, GPT-OSS has sinks, both slide in every other layer: as Transformers' eager attention.

    Where padding is not on the left, Transformers counts it in the window, and a window that is never full is compared.
    """
    monkeypatch.setattr(dense, "DENSE_LOGITS", logits_at_a_time)
    model, inputs = CAPPED[family, window], prompts([11, 2, 7, 1], padding)
    caches = {"eager": DynamicCache(config=model.config), "pkv": cache_for(model, inputs, new_tokens=30)}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for tokens in (1, 4, 1):
        logits = logits_of(model, caches, ids, mask)
        torch.testing.assert_close(logits["pkv"], logits["eager"], rtol=1e-4, atol=1e-4)
        ids = torch.randint(2, 97, (4, tokens), generator=torch.Generator().manual_seed(tokens))
        mask = torch.cat([mask, torch.ones_like(ids)], 1)


@pytest.mark.parametrize("family", OPTIONS)
def test_a_prompt_without_mask_or_cache_under_caps_and_sinks(family) -> None:
    model, ids = CAPPED[family, 6], prompts([5, 5], "left")["input_ids"]
    found = {}
    for implementation in ("eager", "pkv"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found[implementation] = model(ids, use_cache=False).logits
    torch.testing.assert_close(found["pkv"], found["eager"], rtol=1e-4, atol=1e-4)
