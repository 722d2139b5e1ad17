"""The README's GPU example runs as shown, and is right."""
from __future__ import annotations

from decode_ref import Case, check
from readme import example  # noqa: E402


def test_gpu_example() -> None:
    names: dict = {}
    exec(example("With a GPU"), names)
    case = Case(**{name: names[name] for name in ("shape", "q", "k_pages", "v_pages", "block_table", "seq_lens")})
    check(names["out"], names["lse"], case, dtype="float16")
