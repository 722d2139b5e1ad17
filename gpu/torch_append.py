"""torch.ops.pkv.append_tokens; gpu.drop_ins.torch_append is its home."""
from gpu.drop_ins.torch_append import append_tokens

__all__ = ["append_tokens"]
