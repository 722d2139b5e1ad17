"""PagedCache with tiers on the GPU: what is loaded is what was computed, from host memory and from a disk."""
from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from tiny_models import make_model, prompts  # noqa: E402

from gpu.cache.prompts.prompt_pool import PromptPool  # noqa: E402
from gpu.cache.tiers.stores import parse_stores  # noqa: E402
from gpu.drop_ins.transformers_attention import register  # noqa: E402
from gpu.drop_ins.transformers_cache import PagedCache  # noqa: E402
from gpu.drop_ins.transformers_prompts import contents_of  # noqa: E402

register()
LENS = [211, 190, 180]


@pytest.mark.parametrize("tiers", [["host:64MiB:50"], ["disk:64MiB:2"], ["host:32MiB:50", "disk:64MiB:10"]])
def test_a_loaded_prompt_gives_the_logits_of_a_computed_one(tiers: list[str], tmp_path) -> None:
    model = make_model("llama", head_dim=64, dtype=torch.float16, device="cuda")
    inputs, (rows, width) = prompts(LENS, "left", device="cuda"), (len(LENS), max(LENS))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(**inputs, position_ids=positions).logits[:, -1]
    model.set_attn_implementation("pkv")
    texts = [f"{tier}={tmp_path / 'kv'}" if tier.startswith("disk") else tier for tier in tiers]

    def begin(pool: PromptPool) -> tuple[PagedCache, int]:
        cache = PagedCache(model.config, max_batch_size=rows, max_seq_len=256, tiers=pool)
        loaded = cache.begin(model, **inputs)
        with torch.no_grad():
            found = model(inputs["input_ids"][:, loaded:], attention_mask=inputs["attention_mask"],
                          position_ids=positions[:, loaded:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)
        return cache, loaded

    host, disks = parse_stores(texts)
    with PromptPool(host=host, disks=disks, contents=contents_of(model, 16)) as pool:
        cache, loaded = begin(pool)
        assert loaded == 0 and cache.keep(inputs["input_ids"], inputs["attention_mask"]) == sum(n // 16 for n in LENS)
        for store in cache._stores:
            store.wait()
        kept = [layer.keys.clone() for layer in cache.layers]
        places = [cache.rows.pages_of(row, length // 16).tolist() for row, length in enumerate(LENS)]
        cache.reset()
        pool.close()  # a cache takes its pages along; host memory goes, disks stay
        cache, loaded = begin(pool)
        if not host:
            assert loaded > width - 32 and pool.stats()["disk"]["faults"] == 0
            for row, length in enumerate(LENS):
                count = (length - (width - loaded)) // 16
                pages = cache.rows.pages_of(row, count).tolist()
                for layer, old in zip(cache.layers, kept):
                    assert torch.equal(layer.keys[pages], old[places[row][:count]])
        elif disks:
            assert loaded < width
        cache.reset()
    if host and not disks:
        with PromptPool(host=host, contents=contents_of(model, 16)) as pool:
            cache, _ = begin(pool)
            cache.keep(inputs["input_ids"], inputs["attention_mask"])
            for store in cache._stores:
                store.wait()
            cache.reset()
            assert cache.begin(model, **inputs) > 160
