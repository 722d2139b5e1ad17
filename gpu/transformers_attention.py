"""The attention implementation "pkv" of Transformers; gpu.drop_ins.transformers_attention is its home."""
from gpu.drop_ins.transformers_attention import register

__all__ = ["register"]
