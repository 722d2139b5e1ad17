"""Our engine behind interfaces that others already call.

`flashinfer` has FlashInfer's decode wrappers, torch_* are operators for torch.compile, transformers_* an attention
implementation with its cache, whose prompts `kvpress_presses` evicts as kvpress says, vllm_* vLLM's attention backend
CUSTOM: `vllm_plugin` registers it, `vllm_backend` is it, `vllm_step` cuts its steps, `vllm_engines` decodes.
`flash_attn` has FlashAttention's functions for inference. `prompts` loads what tiers have of prompts. `refusals` lists
what their interfaces offer and we do not serve; serving more is deleting a line there.
"""
