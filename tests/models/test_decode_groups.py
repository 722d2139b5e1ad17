"""Which kernels' shapes and options a model's layers come to."""
from pathlib import Path

import numpy as np

from pkvsim.models.decode_groups import decode_groups
from pkvsim.models.hugging_face import model_from_config
from pkvsim.models.model_costs import total_weights
from pkvsim.models.presets import get_model
from pkvsim.options import AttentionOptions
from pkvsim.shapes import DecodeShape

CONFIGS = Path(__file__).parent / "configs"
CONTEXTS = np.array([100, 8192, 8193, 20_000], np.int64)


def groups(name, **options):
    return decode_groups(get_model(CONFIGS / f"{name}.json"), 16, **options)


def test_sinks_and_windows():
    sliding, full = groups("openai--gpt-oss-20b", query_tokens=2)
    assert (sliding.count, full.count) == (12, 12)
    assert sliding.shape == full.shape == DecodeShape(64, 8, 64, 16)
    assert sliding.options == AttentionOptions(window=128, sinks=True, query_tokens=2)
    assert full.options == AttentionOptions(sinks=True, query_tokens=2)
    assert (sliding.kernel_lens(CONTEXTS) == CONTEXTS).all()


def test_heads_that_differ_by_layer():
    sliding, full = groups("google--gemma-4-26B-A4B")
    assert (sliding.count, sliding.shape, sliding.options.window) == (25, DecodeShape(16, 8, 256, 16), 1024)
    assert (full.count, full.shape, full.options) == (5, DecodeShape(16, 2, 512, 16), AttentionOptions())


def test_chunks_and_selections_are_shorter_rows():
    chunked, full = groups("meta-llama--Llama-4-Maverick-17B-128E-Instruct")
    assert (chunked.count, full.count, chunked.options) == (36, 12, AttentionOptions())
    assert chunked.kernel_lens(CONTEXTS).tolist() == [100, 8192, 1, 20_000 - 16_384]
    dense, chosen = groups("nvidia--MiniMax-M3-NVFP4")
    assert (dense.count, chosen.count) == (3, 57)
    assert chosen.kernel_lens(CONTEXTS).tolist() == [100, 2048, 2048, 2048]


def test_kinds_that_no_grouped_kernel_serves():
    (latent,) = groups("deepseek-ai--DeepSeek-V3")
    assert (latent.shape, latent.options, latent.count) == (None, None, 61)
    assert latent.attention.decode_read_bytes(1000, 2) == 1000 * 576 * 2
    assert latent.attention.decode_flops(1000) == 2 * 128 * (576 + 512) * 1000
    state, full = groups("Qwen--Qwen3.5-27B")
    assert (state.count, state.shape, full.count, full.shape) == (48, None, 16, DecodeShape(24, 4, 256, 16))
    assert state.attention.decode_read_bytes(10, 2) == 2 * state.attention.state_bytes
    csa, hca = groups("deepseek-ai--DeepSeek-V4-Flash")[1:]
    assert csa.attention.decode_read_bytes(8192, 2) == (128 + 512) * 1024 + 2048 * 132 + 2 * csa.attention.state_bytes
    assert hca.attention.decode_read_bytes(8192, 2) == (128 + 64) * 1024 + 2 * hca.attention.state_bytes


def test_soft_caps():
    config = {
        "architectures": ["Gemma2ForCausalLM"], "hidden_size": 2304, "num_hidden_layers": 26, "head_dim": 256,
        "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 9216, "vocab_size": 256000,
        "max_position_embeddings": 8192, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
    }  # fmt: skip
    model = model_from_config(config, name="gemma-2-2b", source="", where="config.json")
    assert total_weights(model).parameters == 2_614_341_888  # https://huggingface.co/google/gemma-2-2b, safetensors
    sliding, full = decode_groups(model, 16)
    assert sliding.options == AttentionOptions(window=4096, soft_cap=50.0) and full.options.soft_cap == 50
