"""The functions of flash_attn that engines call for inference, under their names and signatures.

`with_kvcache` is the decode step: new tokens are rotated and written into their pages, then all rows attend to theirs,
by our kernels, also in a captured CUDA graph. `cache_pages` sees FlashAttention's caches as pages, `writing` holds what
writes them, `checks` refuses what does not fit before. `prefill` is the packed prompts' side, by the FlashAttention
that PyTorch brings, or `dense`. `install` stands in for the package flash_attn itself, `transformers_name` registers
the functions with Transformers.
"""
from gpu.drop_ins.flash_attn.prefill import flash_attn_func, flash_attn_varlen_func
from gpu.drop_ins.flash_attn.with_kvcache import flash_attn_with_kvcache

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
