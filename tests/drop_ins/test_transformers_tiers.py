"""PagedCache with tiers: prompts whose beginnings are in the pool are not computed again; on the CPU, in float32."""
from __future__ import annotations

import os
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from tiny_models import make_model, prompts
from torch_paged import serve_op_on_cpu

from gpu.cache.prompts.prompt_pool import PromptPool
from gpu.cache.tiers.stores import parse_stores
from gpu.drop_ins.transformers_attention import register
from gpu.drop_ins.transformers_cache import PagedCache
from gpu.drop_ins.transformers_prompts import contents_of
from pkvsim.memory.blocks.block_keys import block_keys

serve_op_on_cpu()
register()
PAGE, NEW_TOKENS = 4, 6
MODEL = make_model("llama")
MODEL.set_attn_implementation("pkv")


@pytest.fixture
def make_pool(tmp_path):
    """A pool of host memory and a disk; again: the same disk, as another process has it."""

    def make(*, blocks: int = 200, model=MODEL) -> PromptPool:
        block_bytes = 2 * 3 * PAGE * 2 * 8 * 4  # K and V of 3 layers of 2 heads of 8 elements
        host, disks = parse_stores([f"host:{blocks * block_bytes}:1", f"disk:{blocks * block_bytes}:1={tmp_path / 'kv'}"],
                                   pin=False)  # fmt: skip
        disks = [replace(disk, ring_bytes=2**17, bytes_under_way=2**16, reader="preadv") for disk in disks]
        return PromptPool(host=host, disks=disks, contents=contents_of(model, PAGE))

    return make


def make_cache(pool, inputs, *, model=MODEL) -> PagedCache:
    rows, width = inputs["input_ids"].shape
    return PagedCache(model.config, max_batch_size=rows, max_seq_len=width + NEW_TOKENS, page_size=PAGE, tiers=pool)


def serve(cache, inputs, *, model=MODEL) -> tuple[torch.Tensor, int, list[int]]:
    """(tokens, columns that begin() loaded, tokens of each call of the model)."""
    widths: list[int] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    try:
        loaded = cache.begin(model, **inputs)
        found = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **cache.argument_of(model))
    finally:
        hook.remove()
    return found, loaded, widths


def settle(cache) -> None:
    """Waits until what is kept has been written, and empties the cache."""
    for store in cache._stores:
        store.wait()
    cache.reset()


def plain(inputs, *, model=MODEL) -> torch.Tensor:
    cache = make_cache(None, inputs, model=model)
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **cache.argument_of(model))


@pytest.mark.parametrize("padding", ["left", "holes"])
def test_a_prompt_that_comes_again_is_not_computed_again(make_pool, padding) -> None:
    inputs = prompts([27, 30, 18], padding)
    expected = plain(inputs)
    with make_pool() as pool:
        cache = make_cache(pool, inputs)
        found, loaded, widths = serve(cache, inputs)
        assert torch.equal(found, expected) and loaded == 0 and widths[0] == 30
        assert cache.keep(found, inputs["attention_mask"]) == sum((n + NEW_TOKENS - 1) // PAGE for n in (27, 30, 18))
        settle(cache)
        found, loaded, widths = serve(cache, inputs)
        assert torch.equal(found, expected) and widths[0] == 30 - loaded
        assert loaded >= (24 if padding == "left" else 16)  # the shortest row's whole blocks, its padding before them
        assert all(width == 1 for width in widths[1:])


def test_another_process_finds_it_after_a_restart(make_pool) -> None:
    inputs = prompts([27], "left")
    with make_pool() as pool:
        cache = make_cache(pool, inputs)
        found, *_ = serve(cache, inputs)
        cache.keep(found, inputs["attention_mask"])
        settle(cache)
        on_disk = pool._cache.tiers_of(block_keys(inputs["input_ids"][0].tolist(), PAGE))
    assert 1 in on_disk
    with make_pool() as pool:  # host memory is gone with its process; the first block may be among what is lost
        cache = make_cache(pool, inputs)
        again, loaded, _ = serve(cache, inputs)
        assert torch.equal(again, found)
        leading = next((at for at, tier in enumerate(on_disk) if tier == 0), len(on_disk))
        assert loaded == min(leading * PAGE, 26)


def test_a_prompt_that_begins_alike_loads_what_it_shares(make_pool) -> None:
    first = prompts([29], "left", seed=1)
    second = {name: value.clone() for name, value in first.items()}
    second["input_ids"][0, 18:] = prompts([11], "left", seed=2)["input_ids"]
    with make_pool() as pool:
        cache = make_cache(pool, first)
        found, *_ = serve(cache, first)
        cache.keep(found, first["attention_mask"])
        settle(cache)
        found, loaded, widths = serve(cache, second)
        assert loaded == 16 and widths[0] == 29 - 16 and torch.equal(found, plain(second))


def test_what_a_tier_lost_is_computed(make_pool, tmp_path) -> None:
    inputs = prompts([30, 21], "left")
    expected = plain(inputs)
    with make_pool() as pool:
        cache = make_cache(pool, inputs)
        found, *_ = serve(cache, inputs)
        cache.keep(found, inputs["attention_mask"])
        settle(cache)
        with open(tmp_path / "kv" / "blocks", "r+b") as file:  # flips bits of every block that the disk has
            size = os.fstat(file.fileno()).st_size
            for at in range(5000, size, 4096):
                file.seek(at)
                file.write(b"\xff" * 64)
        os.sync()
        found, loaded, _ = serve(cache, inputs)
        assert torch.equal(found, expected) and loaded < 29
        assert pool.stats()["disk"]["faults"] > 0


@pytest.mark.parametrize("fails", ["load", "wait_layer"])
def test_a_load_that_cannot_be_had_leaves_an_empty_cache(make_pool, monkeypatch, fails) -> None:
    """Else a caller who goes on would decode behind tokens that nobody loaded, or reuse pages that copies write to."""
    inputs = prompts([30, 21], "left")
    expected = plain(inputs)
    with make_pool() as pool:
        cache = make_cache(pool, inputs)
        found, *_ = serve(cache, inputs)
        cache.keep(found, inputs["attention_mask"])
        settle(cache)
        free, begun = cache.num_free_pages, []

        def load(keys, pages):
            if fails == "load" and begun:
                raise RuntimeError("the GPU has fallen off the bus")
            begun.append(PromptPool.load(pool, keys, pages))
            if fails == "wait_layer":
                begun[-1].cancel()
            return begun[-1]

        monkeypatch.setattr(pool, "load", load)
        with pytest.raises((RuntimeError, ValueError), match="off the bus|cancelled"):
            cache.begin(MODEL, **inputs)
        assert begun and all(one._cancelled for one in begun)
        assert (cache.num_free_pages, cache.get_seq_length()) == (free, 0)
        monkeypatch.undo()
        found = MODEL.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **cache.argument_of(MODEL))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rate", [1.0, 1e9])
def test_loading_is_left_alone_where_the_model_computes_faster(make_pool, rate) -> None:
    inputs = prompts([30, 21], "left")
    with make_pool() as pool:
        pool.prefill_tokens_per_s = rate
        cache = make_cache(pool, inputs)
        found, *_ = serve(cache, inputs)
        cache.keep(found, inputs["attention_mask"])
        settle(cache)
        again, loaded, widths = serve(cache, inputs)
        assert torch.equal(again, found) and widths[0] == 30 - loaded
        assert loaded == 0 if rate == 1e9 else loaded >= 16


@pytest.mark.parametrize("rate", [0, -1.0, float("inf"), float("nan")])
def test_a_rate_of_prefill_that_is_none_is_refused(make_pool, rate) -> None:
    with pytest.raises(ValueError, match="^prefill_tokens_per_s"):
        PromptPool(contents="x", host=make_pool().host, prefill_tokens_per_s=rate)


def test_other_weights_are_refused(make_pool) -> None:
    inputs = prompts([9], "left")
    with make_pool() as pool:
        make_cache(pool, inputs).begin(MODEL, **inputs)
    other = make_model("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.01)
    with make_pool(model=other) as pool, pytest.raises(ValueError, match="directory: expected blocks of"):
        make_cache(pool, inputs).begin(other, **inputs)


def test_another_version_of_transformers_makes_the_same_blocks(monkeypatch) -> None:
    before, written = contents_of(MODEL, PAGE), MODEL.config.to_json_string()
    version = MODEL.config.to_dict()["transformers_version"]
    changes = {version: "6.0.0", '"rms_norm_eps": 1e-06': '"rms_norm_eps": 1e-05'}
    assert all(old in written for old in changes)
    found = []
    for old, new in changes.items():
        monkeypatch.setattr(type(MODEL.config), "to_json_string", lambda _, text=written.replace(old, new): text)
        found.append(contents_of(MODEL, PAGE) == before)
    assert found == [True, False]


def test_a_second_cache_does_not_get_what_is_loaded_into_the_first_ones_pages(make_pool) -> None:
    inputs = prompts([27], "left")
    with make_pool() as pool:
        first, second = (make_cache(pool, inputs) for _ in range(2))
        found, *_ = serve(first, inputs)
        first.keep(found, inputs["attention_mask"])
        settle(first)
        for call in (lambda: second.begin(MODEL, **inputs), lambda: serve(second, inputs)):
            with pytest.raises(ValueError, match=r"tiers: expected a pool that no other cache uses, close\(\) it first"):
                call()
        assert serve(first, inputs)[1] > 0
        first.reset()
        pool.close()
        again, *_ = serve(second, inputs)
        assert torch.equal(again, found)
        with pytest.raises(ValueError, match="no other cache uses"):
            first.begin(MODEL, **inputs)


@pytest.mark.parametrize(("change", "said"), [
    ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "pixel_values: expected input_ids and attention_mask alone"),
    ({"token_type_ids": torch.ones(2, 9)}, "token_type_ids: expected input_ids"),
    ({"attention_mask": torch.ones(2, 8)}, r"attention_mask: expected \[2, 9\], got \[2, 8\]"),
    ({"input_ids": torch.zeros(9, dtype=torch.long)}, r"input_ids: expected integers .* got torch.int64 \[9\]"),
])
def test_prompts_that_are_more_than_their_tokens_are_refused(make_pool, change, said) -> None:
    inputs = prompts([9, 5], "left")
    with make_pool() as pool:
        cache = make_cache(pool, inputs)
        with pytest.raises(ValueError, match=said):
            cache.begin(MODEL, **(inputs | change))
        assert cache.begin(MODEL, **inputs, token_type_ids=torch.zeros(2, 9)) == 0
        found = MODEL.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **cache.argument_of(MODEL))
        with pytest.raises(ValueError, match="attention_mask: expected of the first of"):
            cache.keep(found, torch.ones(2, 99))
        assert cache.keep(found, inputs["attention_mask"]) > 0
        settle(cache)


def test_refusals(make_pool) -> None:
    inputs = prompts([9, 5], "left")
    cache = make_cache(None, inputs)
    with pytest.raises(ValueError, match="tiers: expected a PromptPool"):
        cache.begin(MODEL, **inputs)
    with pytest.raises(ValueError, match="host, disks: expected at least one tier"):
        PromptPool(contents="x")
    dynamic = make_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with make_pool() as pool:
        with pytest.raises(NotImplementedError, match="tiers: expected rotary embeddings"):
            make_cache(pool, inputs, model=dynamic)
        cache = make_cache(pool, inputs)
        with pytest.raises(ValueError, match="token_ids: expected the cache's rows"):
            cache.keep(inputs["input_ids"])
        found, *_ = serve(cache, inputs)
        with pytest.raises(ValueError, match="begin: expected an empty cache"):
            cache.begin(MODEL, **inputs)
        with pytest.raises(ValueError, match="tokens of row 0"):
            cache.keep(found[:, :10])
        with pytest.raises(ValueError, match="tiers: expected a pool that no other cache uses"):
            pool.open([], [])
    assert not pool.is_open
