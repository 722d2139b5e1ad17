"""What our vLLM adapter touches of vLLM, and which of its bands do."""
from __future__ import annotations

ANY = ("*",)  # all fields or members, not a choice of them

# Module -> class or function -> what of a class is touched, "" for functions. Methods, fields, class attributes, and
# attributes that methods set on self. A class comes after its bases.
TOUCHED: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm.config": {
        "VllmConfig": ("additional_config", "cache_config", "compilation_config", "model_config", "parallel_config",
                       "scheduler_config", "speculative_config"),
        "CacheConfig": ("cache_dtype", "kv_sharing_fast_prefill"),
        "CompilationConfig": ("max_cudagraph_capture_size", "static_forward_context"),
        "ModelConfig": ("dtype",),
        "ParallelConfig": ("data_parallel_size", "use_ubatching"),
        "SchedulerConfig": ("max_num_seqs",),
        "SpeculativeConfig": ("num_speculative_tokens",),
        "get_current_vllm_config": (),
    },
    "vllm.config.cache": {"CacheDType": ()},
    "vllm.forward_context": {"ForwardContext": ("attn_metadata",), "get_forward_context": ()},
    "vllm.logger": {"init_logger": (), "_VllmLogger": ("info_once", "warning_once")},
    "vllm.model_executor.layers.attention": {"Attention": ("impl", "head_size_v", "layer_name")},
    "vllm.v1.attention.backend": {
        "AttentionBackend": ("get_builder_cls", "get_impl_cls", "get_kv_cache_shape", "get_name",
                             "supports_batch_invariance", "supports_kv_cache_dtype", "validate_configuration",
                             "supported_kv_cache_dtypes"),
        "AttentionCGSupport": ANY,
        "AttentionLayer": ("_k_scale", "_v_scale"),
        "AttentionImplBase": ("head_size", "num_heads", "process_weights_after_loading", "scale",
                              "supports_quant_query_input", "total_cp_world_size"),
        "AttentionImpl": ("forward", "fused_output_quant_supported", "kv_cache_dtype"),
        "AttentionMetadataBuilder": ("__init__", "_cudagraph_support", "build", "build_for_cudagraph_capture",
                                     "build_for_drafting", "get_cudagraph_support", "kv_cache_spec", "layer_names",
                                     "reorder_batch_threshold", "supports_update_block_table", "update_block_table",
                                     "use_cascade_attention", "vllm_config"),
        "AttentionType": ANY,
        "CommonAttentionMetadata": (*ANY, "replace"),
    },
    "vllm.v1.attention.backends.flash_attn": {
        "FlashAttentionBackend": ("forward_includes_kv_cache_update", "get_kv_cache_shape", "get_kv_cache_stride_order",
                                  "supports_kv_cache_dtype"),
        "FlashAttentionMetadata": ("mm_prefix_range_tensor",),
        "FlashAttentionImpl": ("__init__", "alibi_slopes", "attn_type", "do_kv_cache_update", "forward", "head_size",
                               "kv_cache_dtype", "logits_soft_cap", "num_heads", "num_kv_heads", "scale", "sinks",
                               "sliding_window"),
        "FlashAttentionMetadataBuilder": ("__init__", "build", "supports_update_block_table", "update_block_table"),
    },
    "vllm.v1.attention.backends.registry": {"AttentionBackendEnum": ("CUSTOM",), "register_backend": ()},
    "vllm.v1.attention.backends.triton_attn": {
        "TritonAttentionBackend": ("forward_includes_kv_cache_update", "get_kv_cache_shape",
                                   "get_kv_cache_stride_order", "supported_kv_cache_dtypes"),
        "TritonAttentionImpl": ("__init__", "_ensure_scale_caches", "_is_per_token_head_quant", "_k_scale_cache",
                                "_v_scale_cache", "alibi_slopes", "attn_type", "do_kv_cache_update", "forward",
                                "fused_output_quant_supported", "head_size", "kv_cache_dtype", "logits_soft_cap",
                                "num_heads", "num_kv_heads", "scale", "sinks", "sliding_window",
                                "supports_quant_query_input"),
        "TritonAttentionMetadata": ("mm_prefix_range", "mm_prefix_range_tensor"),
        "TritonAttentionMetadataBuilder": ("__init__", "build", "build_for_cudagraph_capture"),
    },
    "vllm.v1.kv_cache_interface": {"KVCacheSpec": ("block_size",)},
}
# What of a band is touched besides, where others have no such name or another meaning of it.
TOUCHED_TOO: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "0.33": {
        "vllm.v1.attention.backend": {
            "AttentionBackend": ("supports_dcp", "supports_device_cpu_query_lens_mismatch", "supports_pcp",
                                 "supports_rswa"),
            "AttentionImplBase": ("supports_dcp", "supports_pcp"),
            "AttentionMetadataBuilder": ("supports_draft_decode_metadata_update", "update_draft_decode_metadata"),
        },
        "vllm.v1.attention.backends.flash_attn": {
            "FlashAttentionBackend": ("supported_kv_cache_dtypes", "supports_rswa"),
            "FlashAttentionMetadata": ("mm_prefix_query_range_tensor",),
            "FlashAttentionImpl": ("supports_dcp",),
            "FlashAttentionMetadataBuilder": ("supports_draft_decode_metadata_update",),
        },
        "vllm.v1.kv_cache_layout": {"KVCacheLayout": ANY},
    },
}


def band_of(release: str) -> str:
    return ".".join(release.split(".")[:2])


def touched(band: str) -> dict[str, dict[str, tuple[str, ...]]]:
    """TOUCHED, and what of the band is touched too."""
    whole = {module: dict(names) for module, names in TOUCHED.items()}
    for module, names in TOUCHED_TOO.get(band, {}).items():
        for name, wanted in names.items():
            of_module = whole.setdefault(module, {})
            of_module[name] = (*of_module.get(name, ()), *wanted)
    return whole
