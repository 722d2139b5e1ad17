"""Our engine behind interfaces that others already call.

`flashinfer` has FlashInfer's decode wrappers; `torch_decode` and `torch_append` are operators for torch.compile.
Transformers gets an attention implementation (`transformers_attention`) with its cache (`transformers_cache`, a
`transformers_layer` for each of the model's, `transformers_rows` that they share, and `transformers_heads` where KV
heads evict pages of their own), whose prompts `kvpress_presses` evicts as kvpress says and tiers know by
`transformers_prompts`. vLLM gets its attention backend CUSTOM (`vllm`). `flash_attn` has FlashAttention's functions for
inference. `refusals` lists what their interfaces offer and we do not serve; serving more is deleting a line there.
"""
