"""Transformers on FlashAttention's functions of ours: whole calls, and continuous batching with its block tables."""
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from flash_on_cpu import serve_flash_on_cpu  # noqa: E402
from tiny_models import make_model, prompts  # noqa: E402
from transformers import GenerationConfig  # noqa: E402
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.generation.continuous_batching import initialization  # noqa: E402

from gpu.drop_ins.flash_attn.transformers_name import NAME  # noqa: E402
from gpu.flash_attn import register_with_transformers  # noqa: E402

register_with_transformers()
register_with_transformers()  # does not wrap itself
LENS, NEW_TOKENS = [11, 2, 7, 1], 10


def tokens_of(model: object, implementation: str) -> list[list[int]]:
    inputs = prompts(LENS, "left")
    model.set_attn_implementation(implementation)
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, max(LENS):].tolist()


@pytest.mark.parametrize("family, theirs, options", [
    ("llama", "sdpa", {}), ("mistral", "sdpa", {"sliding_window": 6}), ("gemma2", "eager", {"sliding_window": 6}),
    ("gpt_oss", "eager", {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2})])
def test_generate_gives_the_same_tokens(family, theirs, options) -> None:
    model = make_model(family, **options)
    expected = tokens_of(model, theirs)
    if family == "gpt_oss":  # says by name which implementations have sinks
        model._compatible_flash_implementations = [NAME]
    assert tokens_of(model, NAME) == expected


@pytest.mark.parametrize("decode_path", [True, False])
def test_continuous_batching_gives_the_same_tokens(decode_path, monkeypatch) -> None:
    """On the CPU Transformers takes its decode path, which needs our kernels, only where it is made to."""
    pytest.importorskip("psutil", reason="Transformers asks it how much memory a CPU has, and takes it for none without")
    engines = serve_flash_on_cpu(monkeypatch)
    if decode_path:
        monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *given, **more: None)
    model, inputs = make_model("qwen3", dtype=torch.float16), prompts(LENS, "left")
    expected = tokens_of(model, "sdpa")
    model.set_attn_implementation(NAME)
    ids = [row[kept.bool()].tolist() for row, kept in zip(inputs["input_ids"], inputs["attention_mask"])]
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pool = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32, max_requests_per_batch=4)
    found = model.generate_batch(ids, generation_config=config, continuous_batching_config=pool, warmup=False)
    assert [output.generated_tokens for output in found.values()] == expected
    assert bool(len(engines)) == decode_path


def test_other_names_still_load_what_they_did() -> None:
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    with pytest.raises((ImportError, ValueError)):
        lazy_import_flash_attention("kernels-community/no-such-flash-attn2")
