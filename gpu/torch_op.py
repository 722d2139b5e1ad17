"""torch.ops.pkv.decode_attention; gpu.drop_ins.torch_decode is its home."""
from gpu.drop_ins.torch_decode import decode_attention

__all__ = ["decode_attention"]
