"""GGUF files as strangers have them: scaled positions, other tokenizers, what is missing or cut short."""
from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from gpu.serve.model.gguf import GgufFile  # noqa: E402
from gpu.serve.model.weights import load  # noqa: E402

HEAD_DIM = 16
TENSORS = {
    "token_embd.weight": (8, 32), "output_norm.weight": (32,), "blk.0.attn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32), "blk.0.attn_k.weight": (16, 32), "blk.0.attn_v.weight": (16, 32),
    "blk.0.attn_output.weight": (32, 32), "blk.0.ffn_norm.weight": (32,), "blk.0.ffn_gate.weight": (64, 32),
    "blk.0.ffn_up.weight": (64, 32), "blk.0.ffn_down.weight": (32, 64),
}  # fmt: skip
TOKENS = ["a", "b", "1", "ab", "11", "<s>", "<think>", "</s>"]
NUMBERS = {
    "context_length": 128, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64,
    "attention.head_count": 2, "attention.head_count_kv": 1,
}  # fmt: skip
METADATA = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": ["a b", "1 1"],
    "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 3, 4, 3],
}  # fmt: skip
FLOATS = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 500.0}


def write(path, *, metadata=None, tensors=None):
    """A Llama of one layer. metadata: more of it, or None in place of a value for none; tensors: more of them."""
    writer = gguf.GGUFWriter(str(path), "llama")
    given = {f"llama.{name}": value for name, value in {**NUMBERS, **FLOATS}.items()} | METADATA
    given |= {"tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.eos_token_id": 7} | (metadata or {})
    for name, value in given.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    rng = np.random.default_rng(0)
    for name, array in {**{name: rng.normal(0, 1, shape) for name, shape in TENSORS.items()}, **(tensors or {})}.items():
        writer.add_tensor(name, np.asarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def rope_of(path):
    return load(path, dtype=torch.float32, device="cpu")[0].rope


def test_factors_of_positions_divide_the_frequencies(tmp_path):
    plain = rope_of(write(tmp_path / "plain.gguf"))
    np.testing.assert_allclose(plain.inv_freq, 500.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM), rtol=1e-6)
    factors = np.array([1, 1, 1.5, 3, 8, 8, 8, 8], np.float32)
    found = rope_of(write(tmp_path / "factors.gguf", tensors={"rope_freqs.weight": factors}))
    np.testing.assert_allclose(found.inv_freq, plain.inv_freq / factors, rtol=1e-6)
    with pytest.raises(ValueError, match=r"rope_freqs.weight: expected \[8\], got \[4\]"):
        rope_of(write(tmp_path / "short.gguf", tensors={"rope_freqs.weight": factors[:4]}))


def test_scaled_positions_are_those_of_the_same_config_json(tmp_path):
    from gpu.serve.model.config import rope_frequencies

    scaled = {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 64}
    for kind in ("linear", "yarn"):
        found = rope_of(write(tmp_path / "model.gguf", metadata={"llama.rope.scaling.type": kind, **scaled}))
        wanted = rope_frequencies({"rope_theta": 500.0, "rope_scaling": {
            "rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 64}}, HEAD_DIM, name="model")
        np.testing.assert_allclose(found.inv_freq, wanted.inv_freq, rtol=1e-6)
        assert found.factor == pytest.approx(wanted.factor)
    with pytest.raises(ValueError, match="rope_type: expected one of"):
        rope_of(write(tmp_path / "model.gguf", metadata={"llama.rope.scaling.type": "longrope", **scaled}))


@pytest.mark.parametrize(("metadata", "tensors", "words"), [
    *(({key: None}, {}, words) for key, words in {
        "llama.attention.head_count": "num_attention_heads: expected", "llama.embedding_length": "hidden_size: expected",
        "tokenizer.ggml.tokens": "vocab_size: expected", "llama.block_count": "num_hidden_layers: expected"}.items()),
    ({"llama.attention.head_count": [2, 2]}, {}, "num_attention_heads: expected"),
    ({"llama.attention.key_length": 16, "llama.rope.dimension_count": 8}, {}, "rope.dimension_count: expected all 16"),
    ({}, {"blk.0.ffn_gate_inp.weight": np.zeros((4, 32))}, "blk.0.ffn_gate_inp.weight: expected no such tensor"),
    ({}, {"other": np.zeros((4, 32))}, "other: expected no such tensor"),
    ({}, {"blk.0.attn_q.weight": np.zeros((16, 32))}, "self_attn.q_proj.weight: expected"),
])  # fmt: skip
def test_files_that_are_not_served(tmp_path, metadata, tensors, words):
    with pytest.raises(ValueError, match=words):
        rope_of(write(tmp_path / "model.gguf", metadata=metadata, tensors=tensors))


def test_files_cut_short_are_named(tmp_path):
    whole = (tmp_path / "whole.gguf")
    write(whole)
    data = whole.read_bytes()
    for length in (*range(0, 1200, 61), len(data) // 2, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut.gguf: cannot read a model"):
            GgufFile(tmp_path / "cut.gguf")


def test_generation_ends_where_a_turn_or_a_message_does(tmp_path):
    for more, expected in (({}, (7,)), ({"eot": 6, "eom": 5}, (7, 6, 5)), ({"eos": None, "eot": 6}, (6,)), ({"eot": 7}, (7,)), ({"eos": None}, ())):
        path = write(tmp_path / "model.gguf", metadata={f"tokenizer.ggml.{end}_token_id": at for end, at in more.items()})
        assert load(path, dtype=torch.float32, device="cpu", dummy=True)[0].eos_token_ids == expected


def tokens_of(path, text):
    pytest.importorskip("transformers")
    return GgufFile(path).tokenizer()(text)["input_ids"]


def test_tokenizers_split_and_begin_as_the_file_says(tmp_path):
    path = tmp_path / "model.gguf"

    def found(text, **metadata):
        return tokens_of(write(path, metadata={f"tokenizer.ggml.{key}": value for key, value in metadata.items()}), text)

    assert found("ab11") == [3, 4]
    assert found("ab11", pre="smollm") == [3, 2, 2]
    assert found("ab11", pre="llama-bpe") == [5, 3, 4]
    assert found("ab11", pre="llama-bpe", add_bos_token=False) == [3, 4]
    assert found("ab11", pre="qwen2", add_bos_token=True) == [5, 3, 2, 2]
    assert found("ab<think>ab</s>") == [3, 6, 3, 7]
    # An e with an accent, of one character or two: "Ã" and "©" are its bytes as GPT-2's alphabet shows them.
    accents = {"tokens": [*TOKENS, "Ã", "©", "Ã©"], "token_type": [1, 1, 1, 1, 1, 3, 4, 3, 1, 1, 1], "merges": ["Ã ©"]}
    assert found("e\u0301", pre="qwen2", **accents) == found("\u00e9", pre="qwen2", **accents) == [10]
    for metadata, words in (({"pre": "deepseek-llm"}, "tokenizer.ggml.pre: expected one of"), ({"merges": None}, "merges: missing"),
                            ({"model": "llama"}, "tokenizer.ggml.model: expected gpt2")):
        with pytest.raises(ValueError, match=words):
            found("ab", **metadata)
