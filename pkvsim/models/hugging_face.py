"""Hugging Face config.json to ModelSpec: Llama, Mistral, Qwen2, Qwen3, Qwen3 MoE and GPT-OSS."""
from __future__ import annotations

from typing import Any

from pkvsim.models.model_spec import ModelSpec, Weights
from pkvsim.shapes import MAX_TOKENS, check_int

LLAMA, MISTRAL, QWEN2 = "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"
QWEN3, QWEN3_MOE, GPT_OSS = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"
ARCHITECTURES = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, GPT_OSS)
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
MXFP4_BYTES = 4.25 / 8  # 4 bits a weight and an 8-bit scale per 32 (OCP MX 1.0)

USED = {
    "architectures", "attention_bias", "dtype", "experts_per_token", "head_dim", "hidden_size", "intermediate_size",
    "layer_types", "max_position_embeddings", "max_window_layers", "mlp_bias", "mlp_only_layers",
    "moe_intermediate_size", "num_attention_heads", "num_experts", "num_experts_per_tok", "num_hidden_layers",
    "num_key_value_heads", "num_local_experts", "decoder_sparse_step", "quantization_config", "sliding_window",
    "tie_word_embeddings", "torch_dtype", "use_sliding_window", "vocab_size",
}  # fmt: skip
IGNORED = {  # change neither sizes nor work
    "attention_dropout", "bos_token_id", "cls_token_id", "eos_token_id", "hidden_act", "id2label",
    "initial_context_length", "initializer_range", "label2id", "model_type", "norm_topk_prob", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "return_dict", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "router_aux_loss_coef", "sep_token_id", "swiglu_limit",
    "tokenizer_class", "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip


class _Fields:
    """Typed access to a config; every complaint names the file and the field."""

    def __init__(self, config: Any, where: str) -> None:
        if not isinstance(config, dict):
            raise ValueError(f"{where}: expected an object of a Hugging Face config, got {type(config).__name__}")
        unknown = sorted(key for key in set(config) - USED - IGNORED if not key.startswith("_"))
        self.config, self.where = config, where
        self.architecture = self._architecture()
        if unknown:
            raise self.error(
                unknown[0], f"unknown for {self.architecture}; remove it if it changes neither weights nor attention"
            )

    def _architecture(self) -> str:
        named = self.config.get("architectures")
        if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES:
            raise self.error("architectures", f"expected one of {', '.join(ARCHITECTURES)}, got {named!r}")
        return named[0]

    def error(self, name: str, message: str) -> ValueError:
        return ValueError(f"{self.where}: field {name}: {message}")

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number >= 1; `default`, if there is one, for a field that is missing or null."""
        value = self.config.get(name)
        if value is None and default is not None:
            return default
        if name not in self.config:
            raise self.error(name, "missing")
        try:
            return check_int(name, value, 1, 2**40)
        except ValueError:
            raise self.error(name, f"expected a whole number >= 1, got {value!r}") from None

    def flag(self, name: str) -> bool:
        value = self.config.get(name, False)
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, got {value!r}")
        return value


def model_from_config(config: Any, *, name: str, source: str, where: str, tensor_parallel: int = 1) -> ModelSpec:
    """The model of a parsed config.json. `where` names the file in errors, `source` goes into the spec.

    Raises ValueError naming the field that is missing, unknown or does not fit.
    """
    fields = _Fields(config, where)
    parallel = check_int("tensor_parallel", tensor_parallel, 1, MAX_TOKENS)
    layers, hidden = fields.integer("num_hidden_layers"), fields.integer("hidden_size")
    q_heads, kv_heads = fields.integer("num_attention_heads"), fields.integer("num_key_value_heads")
    if q_heads % kv_heads:
        raise fields.error("num_key_value_heads", f"expected a divisor of {q_heads} query heads, got {kv_heads}")
    if kv_heads % parallel:
        raise ValueError(f"tensor_parallel: expected a divisor of {name}'s {kv_heads} KV heads, got {parallel}")
    if config.get("head_dim") is None and hidden % q_heads:
        raise fields.error("head_dim", f"missing, and hidden_size {hidden} is no multiple of {q_heads} heads")
    head_dim = fields.integer("head_dim", hidden // q_heads)
    element_bytes, expert_bytes = _weight_sizes(fields)
    experts, per_token, width = _mlp(fields)
    window, sliding = _sliding(fields, layers)

    def weights(matrix: int, vector: int = 0, *, split: int = parallel, matrix_bytes: float = element_bytes) -> Weights:
        """A GPU's share of matrices and of the biases, norms and the like beside them."""
        matrix, vector = -(-matrix // split), -(-vector // split)
        return Weights(matrix + vector, matrix * matrix_bytes + vector * element_bytes, 2 * matrix)

    vocabulary = fields.integer("vocab_size") * hidden
    heads_out = (q_heads + 2 * kv_heads) * head_dim
    gpt_oss = fields.architecture == GPT_OSS
    mlp_bias = 2 * width + hidden if gpt_oss or fields.flag("mlp_bias") else 0
    router = experts * hidden
    norms = 2 * hidden + (2 * head_dim if fields.architecture in (QWEN3, QWEN3_MOE) else 0)
    embedding = weights(vocabulary)
    return ModelSpec(
        name=name,
        source=source,
        tensor_parallel=parallel,
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=fields.integer("vocab_size"),
        max_context=fields.integer("max_position_embeddings"),
        num_q_heads=q_heads // parallel,
        num_kv_heads=kv_heads // parallel,
        head_dim=head_dim,
        sliding_window=window,
        num_sliding_layers=sliding,
        num_experts=experts,
        experts_per_token=per_token,
        attention=weights(
            (heads_out + q_heads * head_dim) * hidden, _attention_vector(fields, heads_out, q_heads, hidden)
        ),
        norms_and_router=weights(router, norms + (experts if gpt_oss else 0), split=1),
        mlp=weights(3 * hidden * width, mlp_bias, matrix_bytes=expert_bytes),
        embedding=Weights(embedding.parameters, embedding.bytes),
        final_norm=weights(0, hidden, split=1),
        lm_head=embedding,
        tied_embeddings=fields.flag("tie_word_embeddings"),
    )


def _attention_vector(fields: _Fields, heads_out: int, q_heads: int, hidden: int) -> int:
    """Biases and attention sinks of a layer's projections."""
    if fields.architecture == QWEN2:
        return heads_out
    biases = heads_out + hidden if fields.flag("attention_bias") else 0
    return biases + (q_heads if fields.architecture == GPT_OSS else 0)


def _weight_sizes(fields: _Fields) -> tuple[float, float]:
    """Bytes per weight, and per weight of an MLP matrix."""
    key = "dtype" if "dtype" in fields.config else "torch_dtype"
    named = fields.config.get(key, "bfloat16")
    if named not in DTYPE_BYTES:
        raise fields.error(key, f"expected one of {', '.join(DTYPE_BYTES)}, got {named!r}")
    size = DTYPE_BYTES[named]
    quantization = fields.config.get("quantization_config")
    if quantization is None:
        return size, size
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "mxfp4" or fields.architecture != GPT_OSS:
        raise fields.error("quantization_config", f"expected none, or mxfp4 experts in {GPT_OSS}, got {method!r}")
    return size, MXFP4_BYTES


def _mlp(fields: _Fields) -> tuple[int, int, int]:
    """Experts (0: dense), experts per token, and the width of one MLP."""
    if fields.architecture == GPT_OSS:
        chosen = "num_experts_per_tok" if "num_experts_per_tok" in fields.config else "experts_per_token"
        experts, width = fields.integer("num_local_experts"), fields.integer("intermediate_size")
    elif fields.architecture == QWEN3_MOE:
        if fields.config.get("mlp_only_layers") or fields.integer("decoder_sparse_step", 1) != 1:
            raise fields.error("mlp_only_layers", "expected experts in every layer")
        chosen = "num_experts_per_tok"
        experts, width = fields.integer("num_experts"), fields.integer("moe_intermediate_size")
    else:
        return 0, 0, fields.integer("intermediate_size")
    per_token = fields.integer(chosen)
    if per_token > experts:
        raise fields.error(chosen, f"expected at most the {experts} experts, got {per_token}")
    return experts, per_token, width


def _sliding(fields: _Fields, layers: int) -> tuple[int, int]:
    """Window (0: none) and how many layers slide."""
    types = fields.config.get("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
            raise fields.error("layer_types", f"expected {layers} of {' or '.join(known)}, got {types!r:.200}")
        sliding = types.count("sliding_attention")
    elif fields.architecture == GPT_OSS:
        sliding = (layers + 1) // 2
    elif fields.architecture == MISTRAL:
        sliding = layers if fields.config.get("sliding_window") is not None else 0
    elif fields.architecture != LLAMA and fields.flag("use_sliding_window"):
        sliding = max(layers - fields.integer("max_window_layers"), 0)
    else:
        sliding = 0
    return (fields.integer("sliding_window"), sliding) if sliding else (0, 0)
