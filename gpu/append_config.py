"""Which variant of the append kernel a writer runs, and how many warps share a token. Needs neither CuPy nor a GPU."""

from __future__ import annotations

from gpu.config import DTYPES
from pkvsim import DecodeShape
from pkvsim.rope import HALF, ROPE_STYLES, Rope

WARPS = 4  # of a CTA, as in append.cu
WARPS_PER_SM = 16  # worth of work, from which on a warp takes several steps of its token
LANE_ELEMENTS = 16  # of a head that a lane holds
MAX_HEAD_DIM = 32 * LANE_ELEMENTS
CACHE_TYPES = {"float8_e4m3fn": 1, "float8_e5m2": 2, "int8": 3}  # value of CACHE_TYPE; 0 is the tokens' own dtype
FP8_TYPES = ("float8_e4m3fn", "float8_e5m2")
SIGNATURE = "p" * 12 + "i" * 9 + "q" * 19 + "f" * 3  # parameters of pkv_append, see gpu.launch


def defines(shape: DecodeShape, dtype: str, *, kv_dtype: str, head_dim_v: int, rope: Rope | None) -> dict[str, int]:
    """Compile-time constants of append.cu."""
    styles = {style: 1 if style == HALF else 2 for style in ROPE_STYLES}
    return {
        "DTYPE_BF16": DTYPES[dtype],
        "CACHE_TYPE": CACHE_TYPES.get(kv_dtype, 0),
        "HEAD_DIM": shape.head_dim,
        "HEAD_DIM_V": head_dim_v,
        "ROPE_STYLE": 0 if rope is None else styles[rope.style],
        "ROPE_TABLE": int(rope is not None and rope.inv_freq is None),
        "ROTARY_DIM": 0 if rope is None else rope.rotary_dim,
    }


def lanes_per_head(widest_head_dim: int) -> int:
    """LANES of append.cu: the power of two that holds a head."""
    return 1 << (-(-widest_head_dim // LANE_ELEMENTS) - 1).bit_length()


def chunks_per_token(num_heads: int, widest_head_dim: int, num_tokens: int, num_sms: int) -> int:
    """Warps that share a token of num_heads (K, V and query heads): one for each step of its heads where tokens are
    few, a single one where they fill the GPU."""
    steps = -(-num_heads // (32 // lanes_per_head(widest_head_dim)))
    return min(steps, -(-num_sms * WARPS_PER_SM // max(1, num_tokens)))
