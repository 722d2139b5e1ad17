"""A PagedCache that evicted per head goes on as Transformers' own cache cut to the same tokens does, on the GPU.

    python -m pytest -q tests/gpu/drop_ins/test_gpu_transformers_eviction.py
"""
from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from first_element_press import Press
from tiny_models import VOCABULARY, make_model
from transformers import DynamicCache

from gpu.drop_ins.kvpress_presses import pressed
from gpu.drop_ins.transformers_attention import register
from gpu.drop_ins.transformers_cache import PagedCache


class Recorded(Press):
    """Its scores by layer, so that both caches keep the same tokens where rounding would tell near ties apart."""

    scores: list[torch.Tensor]

    def score(self, *given: object) -> torch.Tensor:
        self.scores.append(super().score(*given))
        return self.scores[-1]


@torch.no_grad()
def test_steps_after_an_eviction() -> None:
    """Pages of one token: the prompt is cut, three tokens are asked, and five decode steps read what is kept."""
    register()
    model = make_model("llama", head_dim=64, dtype=torch.float16, device="cuda")
    torch.manual_seed(0)
    ids, press = torch.randint(2, VOCABULARY, (3, 130), device="cuda"), Recorded(0.7)
    press.scores = []
    dense = DynamicCache(config=model.config)
    cache = PagedCache(model.config, max_batch_size=3, max_seq_len=160, page_size=1)
    steps = [(0, 122), (122, 125), *((at, at + 1) for at in range(125, 130))]
    for begin, end in steps:
        logits = []
        for own, implementation in ((cache, "pkv"), (dense, "sdpa")):
            model.set_attn_implementation(implementation)
            at = torch.arange(begin, end, device="cuda")[None].expand(3, -1)
            given = {"past_key_values": own, "position_ids": at}
            if own is cache and not begin:
                with pressed(press, model, cache):
                    logits.append(model(ids[:, begin:end], **given).logits)
            else:
                logits.append(model(ids[:, begin:end], **given).logits)
        if not begin:
            for layer, own, scores in zip(dense.layers, cache.layers, press.scores, strict=True):
                places = scores.topk(36, dim=-1).indices.sort(dim=-1).values
                layer.keys, layer.values = (x.gather(2, places[..., None].expand(-1, -1, -1, 64))
                                            for x in (layer.keys, layer.values))
                assert own.heads.lengths.tolist() == [[36, 36]] * 3
                assert own.heads.num_free_pages == 3 * 2 * (160 - 36)
        error = float((logits[0].float() - logits[1].float()).abs().max())
        assert error <= 0.03 * float(logits[1].float().abs().max()), (begin, error)
