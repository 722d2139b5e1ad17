"""A press as gpu.drop_ins.kvpress_presses takes one, without the package."""
from __future__ import annotations

import contextlib

import torch


class Press:
    """What the adapter asks of a ScorerPress: keeps the keys of the largest first element."""

    def __init__(self, compression_ratio: float) -> None:
        self.compression_ratio = compression_ratio

    def score(self, module, hidden_states, keys, values, attentions, kwargs) -> torch.Tensor:
        assert attentions is None and hidden_states.shape[1] == keys.shape[2] and "position_embeddings" in kwargs
        return keys[..., 0]

    def compress(self, module, hidden_states, keys, values, attentions, kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.compression_ratio:
            return keys, values
        count = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        at = scores.topk(count, dim=-1).indices[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, at), values.gather(2, at)

    def forward_hook(self, *_: object) -> None:
        raise AssertionError("the adapter's hook takes the place of the press's")

    @contextlib.contextmanager
    def __call__(self, model):
        hooks = [layer.self_attn.register_forward_hook(self.forward_hook, with_kwargs=True)
                 for layer in model.model.layers]  # fmt: skip
        yield
        for hook in hooks:
            hook.remove()
