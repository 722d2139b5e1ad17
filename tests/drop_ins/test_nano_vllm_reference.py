"""The model that run_nano_vllm.py compares tokens with computes what the saved one is, also far into a prompt."""
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")
from run_nano_vllm import NEAR_TIE, save_model  # noqa: E402
from transformers import Qwen3ForCausalLM  # noqa: E402

TOKENS = 1400


def test_rounds_products_but_no_rotation(tmp_path) -> None:
    model = save_model(tmp_path, layers=2)
    assert model.dtype == torch.bfloat16 and not model.training
    exact = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    frequencies = 1e4 ** -(torch.arange(0, 128, 2).double() / 128)
    assert torch.allclose(model.model.rotary_emb.inv_freq.double(), frequencies, rtol=1e-6, atol=0)
    ids = torch.randint(3, 4096, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = (one(ids, logits_to_keep=64).logits[0].float() for one in (model, exact))
    errors = (found - expected) / expected.std(-1, keepdim=True)
    assert errors.square().mean().sqrt() < 0.02
    lost = expected.amax(-1) - expected.gather(1, found.argmax(-1, keepdim=True))[:, 0]
    assert (lost < NEAR_TIE / 2 * expected.std(-1)).all()
