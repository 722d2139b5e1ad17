"""FlashAttention's functions for inference, by our kernels; gpu.drop_ins.flash_attn is their home."""
from gpu.drop_ins.flash_attn.install import install
from gpu.drop_ins.flash_attn.prefill import flash_attn_func, flash_attn_varlen_func
from gpu.drop_ins.flash_attn.transformers_name import register_with_transformers
from gpu.drop_ins.flash_attn.with_kvcache import flash_attn_with_kvcache

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", "install",
           "register_with_transformers"]
