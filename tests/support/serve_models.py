"""Small models as Transformers has them, written to folders that gpu.serve reads, and what they say themselves."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

ROWS_TOGETHER = 32  # sequences of one forward pass


def write_model(folder: Path, family: str, **options: object):
    """A model of tiny_models in a folder, and itself; its heads are of 16, as rotation wants."""
    from tiny_models import make_model

    model = make_model(family, head_dim=16, **options)
    model.save_pretrained(folder)
    return model


def as_transformers(llm):
    """The Llama that an LLM serves, as a Transformers model over the same numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config, weights = LlamaConfig(**llm.config.source), llm.weights
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    found = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm,
             "lm_head.weight": weights.head}
    kv_rows = llm.config.num_kv_heads * llm.config.head_dim
    for index, layer in enumerate(weights.layers):
        at = f"model.layers.{index}."
        q, k, v = layer.qkv.split((len(layer.qkv) - 2 * kv_rows, kv_rows, kv_rows))
        gate, up = layer.gate_up.chunk(2)
        parts = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": layer.out,
                 "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": layer.down,
                 "input_layernorm": layer.input_norm, "post_attention_layernorm": layer.mlp_norm}
        found |= {f"{at}{name}.weight": weight for name, weight in parts.items()}
    model.load_state_dict(found, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(weights.norm.device)
    return model.eval()


@torch.inference_mode()
def disagreements(model, prompts: list[list[int]], outputs: list[list[int]], *, tie: float = 0.0) -> list[tuple]:
    """(prompt, place, gap) of generated tokens that are not the model's own choice after what stands before them; gap:
    how far its logit is below the largest. Those within `tie` are let pass.

    Sequences run together, the longest ones first, padded behind, where nothing before sees the padding."""
    found, device = [], model.device
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]) - len(outputs[at]))
    for begin in range(0, len(order), ROWS_TOGETHER):
        rows = order[begin : begin + ROWS_TOGETHER]
        ids = [torch.tensor([*prompts[at], *outputs[at]]) for at in rows]
        hidden = model.model(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)).last_hidden_state
        kept = [hidden[row, len(prompts[at]) - 1 : len(ids[row]) - 1] for row, at in enumerate(rows)]
        logits = model.lm_head(torch.cat(kept)).float()
        chosen = torch.tensor([token for at in rows for token in outputs[at]], device=device)
        gaps = (logits.amax(-1) - logits.gather(-1, chosen[:, None])[:, 0]).cpu()
        for at, part in zip(rows, gaps.split([len(outputs[at]) for at in rows])):
            found += [(at, int(place), float(part[place])) for place in torch.nonzero(part > tie)[:, 0]]
    return sorted(found)


def prompts_with_shared_heads(count: int, *, vocab_size: int, shared: int, longest: int, seed: int) -> list[list[int]]:
    """Prompts of which most begin with a part of the same tokens."""
    rng = np.random.default_rng(seed)
    head = rng.integers(2, vocab_size, shared)
    return [[*head[: int(rng.integers(0, shared + 1))].tolist(),
             *rng.integers(2, vocab_size, int(rng.integers(1, longest))).tolist()] for _ in range(count)]
