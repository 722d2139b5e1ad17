"""Published configs of many families: what they hold, against figures written out by hand and published ones."""
from functools import cache
from pathlib import Path

import pytest
from model_figures import FIGURES
from paths import SHARED

from pkvsim.models.model_costs import (
    active_weights,
    kv_bytes,
    kv_bytes_per_token,
    mtp_weights,
    state_bytes,
    total_weights,
    weight_bytes,
)
from pkvsim.models.presets import get_model

CONFIGS = Path(__file__).parent / "configs"
ORIGINALS = SHARED / "reference" / "model_configs"


@cache
def load(name):
    return get_model(CONFIGS / f"{name}.json")


def test_every_config_has_its_figures():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(FIGURES)
    assert len(FIGURES) == 66


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name):
    model, figures = load(name), FIGURES[name]
    assert total_weights(model).parameters == pytest.approx(figures.parameters, rel=1e-5)
    narrow = sum(count for count, _ in figures.narrow)
    stored = sum(count * bits / 8 for count, bits in figures.narrow) + 2 * (figures.parameters - narrow)
    assert weight_bytes(model) == pytest.approx(stored, rel=1e-4)
    assert kv_bytes_per_token(model) == pytest.approx(figures.kv, rel=1e-12)
    assert state_bytes(model) == figures.state
    assert any("neither quantization_config nor" in note for note in model.notes) == figures.unstated


@pytest.mark.parametrize("name", [name for name, figures in FIGURES.items() if figures.published])
def test_published_figures(name):
    model = load(name)
    ours = {
        "parameters": total_weights(model).parameters,
        "active": active_weights(model).parameters,
        "weight_bytes": weight_bytes(model),
        "kv": kv_bytes_per_token(model),
        "checkpoint": weight_bytes(model) + mtp_weights(model).bytes,
    }
    for figure, value, source in FIGURES[name].published:
        rel = 8e-3 if figure == "active" else 5e-3  # active counts are published in two digits
        assert ours[figure] == pytest.approx(value, rel=rel), source


@pytest.mark.skipif(not ORIGINALS.is_dir(), reason="the published files are not here")
def test_originals_say_the_same():
    """The copies beside this test leave out what changes nothing: vision towers, names listed layer by layer."""
    for name in FIGURES:
        found = [ORIGINALS / f"{name}{end}" for end in ("_config.json", ".json")]
        original, copy = get_model(next(filter(Path.is_file, found))), load(name)
        assert original.layers == copy.layers, name
        assert (original.embedding, original.lm_head, original.final_norm) == (
            copy.embedding, copy.lm_head, copy.final_norm,
        )  # fmt: skip
        assert (original.notes, original.kv_cache_type) == (copy.notes, copy.kv_cache_type)
        assert mtp_weights(original).parameters == mtp_weights(copy).parameters


@pytest.mark.parametrize("name", FIGURES)
def test_shares_under_tensor_parallel(name, parallel=8):
    """A share is at least its part of the whole; caches divide until there is one KV head a GPU."""
    whole = load(name)
    try:
        share = get_model(CONFIGS / f"{name}.json", tensor_parallel=parallel)
    except ValueError as error:
        assert str(error).startswith("tensor_parallel: expected a divisor")
        return
    assert weight_bytes(whole) / parallel <= weight_bytes(share) * (1 + 1e-6) < weight_bytes(whole)
    assert kv_bytes_per_token(whole) / parallel <= kv_bytes_per_token(share) <= kv_bytes_per_token(whole)
    for (ours, _), (theirs, _) in zip(share.attention_groups, whole.attention_groups, strict=True):
        if theirs.num_kv_heads > 1:
            assert ours.num_kv_heads == max(1, theirs.num_kv_heads // parallel)
        assert ours.num_q_heads * parallel == theirs.num_q_heads


def test_bounded_windows():
    """GPT-OSS: half of its 24 layers keep 128 tokens; Gemma 4: 25 of 30 keep 1,024; Llama 4: chunks of 8,192."""
    layer = 2 * 8 * 64 * 2
    assert kv_bytes(load("openai--gpt-oss-20b"), 10_000) == 12 * layer * (10_000 + 128)
    gemma = load("google--gemma-4-26B-A4B")
    assert kv_bytes(gemma, 5000) == 2 * (25 * 2 * 8 * 256 * 1024 + 5 * 2 * 2 * 512 * 5000)
    scout = load("blis--llama-4-scout-17b-16e-instruct-fp8-dynamic")
    assert kv_bytes(scout, 8193) == 2 * 2 * 8 * 128 * (36 * 1 + 12 * 8193)
    assert kv_bytes(scout, 8192) == 2 * 2 * 8 * 128 * 48 * 8192
