"""What the drop-ins take from others' interfaces but do not serve: one table, and serving more is deleting a line."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pkvsim.options import MAX_QUERY_TOKENS


@dataclass(frozen=True, slots=True)
class Refusal:
    """The values of an argument that are served, as a test and in words."""

    serves: Callable[[object], bool]
    expected: str


def _none(value: object) -> bool:
    return value is None


KV_DATA_TYPES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
REFUSALS = {
    "alibi_slopes": Refusal(_none, "None: no additive bias"),
    "backend": Refusal(lambda v: v in ("auto", "fa2", "fa3"), "auto, fa2 or fa3"),
    "cache_leftpad": Refusal(_none, "None: rows begin at their first page"),
    "cascade window_left": Refusal(lambda v: v < 0, "-1: of a prefix that rows share a window may hide some"),
    "disable_split_kv": Refusal(lambda v: not v, "False: rows are split wherever that balances the CTAs"),
    "dropout": Refusal(lambda v: not v, "0: decode is for inference"),
    "dropout_p": Refusal(lambda v: not v, "0: these functions are for inference"),
    "fixed_split_size": Refusal(_none, "None: rows are split wherever that balances the CTAs"),
    "jit_args": Refusal(_none, "None: no kernels of the caller's"),
    "kv_cache_sf": Refusal(_none, "None: no NVFP4 pages"),
    "kv_data_type": Refusal(lambda v: v in KV_DATA_TYPES, " or ".join(KV_DATA_TYPES)),
    "num_levels": Refusal(lambda v: v == 2, "2: prefixes, and what rows have for themselves"),
    "pos_encoding_mode": Refusal(lambda v: v == "NONE", "NONE: positions are encoded before attention"),
    "position_bias": Refusal(_none, "None: no additive bias"),
    "q_data_type": Refusal(lambda v: v in ("float16", "bfloat16"), "float16 or bfloat16"),
    "q_len_per_req": Refusal(lambda v: v <= MAX_QUERY_TOKENS, f"at most {MAX_QUERY_TOKENS} query tokens per row"),
    "s_aux after an eviction": Refusal(_none, "None: heads that keep pages apart have no sinks"),
    "run args": Refusal(lambda v: not v, "none: no kernels of the caller's"),
    "skip_softmax_threshold_scale_factor": Refusal(_none, "None: every token is read"),
    "use_fp16_qk_reduction": Refusal(lambda v: not v, "False: products are summed in float32"),
    "window after an eviction": Refusal(_none, "None: kept tokens are no longer neighbours"),
    "window_right": Refusal(lambda v: v == 0, "0"),
}


def check_served(name: str, value: object) -> None:
    """Raises NotImplementedError naming the argument unless its value is served."""
    refusal = REFUSALS[name]
    if not refusal.serves(value):
        shape = getattr(value, "shape", None)  # a whole array would bury the message
        got = repr(value) if shape is None else f"{type(value).__name__} {list(shape)}"
        raise NotImplementedError(f"{name}: expected {refusal.expected}, got {got}")
