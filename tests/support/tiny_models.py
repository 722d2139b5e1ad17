"""Small random-weight models of the families that the Transformers drop-in serves, and ragged batches for them."""
from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
# Soft caps and sinks, which SDPA has not.
CAPPED = {"gemma2": (Gemma2Config, Gemma2ForCausalLM), "gpt_oss": (GptOssConfig, GptOssForCausalLM)}
VOCABULARY = 97


def make_model(family: str, *, head_dim: int = 8, dtype: torch.dtype = torch.float32, device: str = "cpu",
               **options: object) -> PreTrainedModel:
    """A model of 3 layers with 6 query and 2 KV heads, whose weights are wide enough that greedy tokens vary."""
    make_config, make = (FAMILIES | CAPPED)[family]
    torch.manual_seed(1)
    config = make_config(vocab_size=VOCABULARY, hidden_size=6 * head_dim, intermediate_size=64, num_hidden_layers=3,
                         num_attention_heads=6, num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=512,
                         initializer_range=2 / (6 * head_dim) ** 0.5, pad_token_id=0, bos_token_id=1, eos_token_id=None,
                         **{"sliding_window": None, **options})
    return make(config).to(device=device, dtype=dtype).eval()


def prompts(lens: list[int], padding: str, *, seed: int = 0, device: str = "cpu") -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [len(lens), max(lens)], padded "left", "right" or "both", or with "holes" inside."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lens)
    mask = torch.zeros((len(lens), width), dtype=torch.long)
    for row, length in enumerate(lens):
        at = {"left": width - length, "right": 0, "both": (width - length) // 2}.get(padding)
        mask[row, torch.randperm(width, generator=generator)[:length] if at is None else slice(at, at + length)] = 1
    ids = torch.randint(2, VOCABULARY, mask.shape, generator=generator) * mask
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
