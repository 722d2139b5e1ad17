"""Typed access to a Hugging Face config that keeps account of what was read: the rest must be known to change nothing.

Fields of no effect are listed here with the reason; a field that is neither read nor listed is refused by name.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pkvsim.shapes import check_int

GENERATION = "sets how text is generated or trained, not what a layer holds"
TOKENS = "names tokens, not sizes"
BOOKKEEPING = "bookkeeping of the library that wrote the file"
ROPE = "positions: the same work and sizes whatever the values"
ROUTING = "changes which experts a router picks, not how many"
NORMS = "a constant inside an element-wise operation"
ACTIVATION = "an element-wise function, small beside the matrices"
VISION = "belongs to the vision or audio part, which is left out"
OLD = "a hint for a training framework"

IGNORED: dict[str, str] = {
    name: why
    for why, names in {
        GENERATION: """add_cross_attention attention_dropout bad_words_ids begin_suppress_tokens chunk_size_feed_forward
            decoder_start_token_id diversity_penalty do_sample early_stopping embd_pdrop encoder_no_repeat_ngram_size
            exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id hidden_dropout hidden_dropout_prob
            initializer_range initializer_factor length_penalty max_length min_length no_repeat_ngram_size
            num_beam_groups num_beams num_return_sequences output_scores problem_type remove_invalid_values
            repetition_penalty resid_pdrop return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
            use_cache router_aux_loss_coef router_jitter_noise aux_loss_alpha seq_aux input_jitter_noise
            output_router_logits num_logits_to_keep mamba_use_mlp residual_in_fp32 rescale_prenorm_residual
            time_step_floor time_step_limit time_step_max time_step_min time_step_rank use_mamba_kernels
            num_reward_heads embedding_dropout attn_pdrop""",
        TOKENS: """bos_token_id eos_token_id pad_token_id cls_token_id sep_token_id unk_token_id mask_token_id
            ignore_index video_placeholder image_placeholder tokenizer_class""",
        BOOKKEEPING: """architectures auto_map cross_attention_hidden_size finetuning_task id2label label2id
            model_type name_or_path output_attentions output_hidden_states prefix pruned_heads return_dict
            task_specific_params tf_legacy_loss tie_encoder_decoder torchscript transformers_version use_bfloat16
            is_llama_config unsloth_fixed unsloth_version for_llm_compressor language_model_only is_decoder
            is_encoder_decoder use_return_dict""",
        ROPE: """rope_theta rope_scaling rope_parameters rope_local_base_freq rope_interleave rope_interleaved
            rotary_dim rotary_emb_base partial_rotary_factor original_max_position_embeddings initial_context_length
            compress_rope_theta indexer_rope_interleave no_rope_layer_interval mla_use_nope use_mrope mrope_section
            no_rope_layers use_rope attn_temperature_tuning floor_scale attn_scale attention_bias_type
            query_pre_attn_scalar rope_type position_embedding_type""",
        ROUTING: """norm_topk_prob n_group topk_group topk_method scoring_func routed_scaling_factor use_grouped_topk
            moe_renormalize moe_router_activation_func moe_router_dtype moe_router_scaling_factor num_expert_group
            use_routing_bias use_moe_router_bias router_scaling_factor norm_after_topk""",
        NORMS: """rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon hc_eps hc_sinkhorn_iters
            use_gemma_norm embedding_multiplier residual_multiplier attention_multiplier logits_scaling
            final_logit_softcapping""",
        ACTIVATION: """hidden_act hidden_activation mlp_hidden_act mamba_hidden_act activation_function swiglu_limit
            swiglu_alpha swiglu_limits swiglu_limits_shared activation_situ_beta activation_situ_linear_beta
            output_gate_type gate_lower_bound""",
        OLD: """pretraining_tp ep_size moe_shared_expert_overlap""",
        VISION: """vision_config audio_config image_token_id image_token_index video_token_id video_token_index
            vision_start_token_id vision_end_token_id audio_token_id boa_token_id boi_token_id boi_token_index
            eoa_token_id eoa_token_index eoi_token_id eoi_token_index media_placeholder_token_id
            vision_soft_tokens_per_image mm_tokens_per_image use_unified_vision_chunk image_grid_pinpoints
            image_seq_length img_token_compression_config multimodal_projector_bias process_image_mode
            projector_hidden_act projector_hidden_size vision_feature_layer vision_feature_select_strategy
            spatial_merge_size vision_token_id""",
    }.items()
    for name in names.split()
}

# Fields that change nothing as long as they have one of these values.
IDLE: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_size_per_layer_input": ((0,), "0: no embeddings per layer"),
    "vocab_size_per_layer_input": ((), "the vocabulary of embeddings per layer, of which there are none"),
    "num_kv_shared_layers": ((0,), "0: every layer has a cache of its own"),
    "use_double_wide_mlp": ((False,), "false: MLPs of one width"),
    "use_bidirectional_attention": ((False, "vision"), "text attends causally"),
    "qkv_bias": ((False,), "false: no biases"),
    "mtp_use_dedicated_embeddings": ((False,), "false: prediction heads share the embedding"),
    "attention_output_gate": ((False,), "false: no output gate"),
    "use_sparse_attention": ((False,), "false: dense attention"),
    "mamba_proj_bias": ((False,), "false: no biases"),
    "use_bias": ((False,), "false: no biases"),
    "attention_k_eq_v": ((False,), "false: keys and values have matrices of their own"),
    "shared_intermediate_size": ((0,), "0: no shared experts"),
    "shared_expert_intermediate_size": ((0,), "0: no shared experts"),
    "mlp_bias": ((False,), "false: no biases"),
    "index_share_for_mtp_iteration": ((True, False), "sets which selection prediction heads use"),
}


class Fields:
    """Typed access to a config; every complaint names the file and the field."""

    def __init__(self, config: Any, where: str, architecture: str = "") -> None:
        if not isinstance(config, dict):
            raise ValueError(f"{where}: expected an object of a Hugging Face config, got {type(config).__name__}")
        self.config: Mapping[str, Any] = config
        self.where = where
        self.architecture = architecture
        self.read: set[str] = set()
        self.ignored: dict[str, str] = {}

    def error(self, name: str, message: str) -> ValueError:
        return ValueError(f"{self.where}: field {name}: {message}")

    def get(self, name: str, default: Any = None) -> Any:
        """A field's value as it is; `default` for one that is missing or null."""
        self.read.add(name)
        value = self.config.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number >= least; `default`, if there is one, for a field that is missing or null."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if name not in self.config:
            raise self.error(name, "missing")
        try:
            return check_int(name, value, least, 2**40)
        except ValueError:
            raise self.error(name, f"expected a whole number >= {least}, got {value!r:.80}") from None

    def first_integer(self, *names: str, least: int = 1) -> int:
        """The first of several names of one field that the config has."""
        for name in names:
            self.read.add(name)
        found = [name for name in names if self.config.get(name) is not None]
        return self.integer(found[0] if found else names[0], least=least)

    def number(self, name: str, default: float = 0.0) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, f"expected a number, got {value!r:.80}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, got {value!r:.80}")
        return value

    def choices(self, name: str, count: int, allowed: tuple[Any, ...]) -> list[Any] | None:
        """A list with one of `allowed` for each of `count` layers; None for a field that is missing or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or any(entry not in allowed for entry in value):
            shown = " or ".join(map(str, allowed))
            raise self.error(name, f"expected {count} of {shown}, got {value!r:.80}")
        return value

    def part(self, name: str) -> Fields:
        """An object inside the config, with an account of its own."""
        value = self.get(name)
        if not isinstance(value, dict):
            raise self.error(name, "missing" if value is None else f"expected an object, got {type(value).__name__}")
        return Fields(value, f"{self.where}: {name}", self.architecture)

    def idle(self, why: str, *names: str) -> None:
        """Fields that have no effect in this config, for a reason that others of its fields give."""
        for name in names:
            if name in self.config and name not in self.read:
                self.read.add(name)
                self.ignored[name] = why

    def finish(self) -> tuple[tuple[str, str], ...]:
        """(field, why) of everything ignored. ValueError names the first field that is not understood."""
        for name, value in self.config.items():
            if name in self.read:
                continue
            if name.startswith("_"):
                self.ignored[name] = BOOKKEEPING
            elif name in IGNORED:
                self.ignored[name] = IGNORED[name]
            elif name in IDLE and (not IDLE[name][0] or value in IDLE[name][0]):
                self.ignored[name] = IDLE[name][1]
            elif value is None:
                self.ignored[name] = "null: not set"
            else:
                raise self.error(
                    name,
                    f"unknown for {self.architecture}; remove it if it changes neither weights nor attention",
                )
        return tuple(sorted(self.ignored.items()))
