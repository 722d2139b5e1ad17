"""Stands in for the package flash_attn, for engines whose imports nobody wants to change."""
from __future__ import annotations

import importlib.util
import sys
import types

from gpu.drop_ins.flash_attn.prefill import flash_attn_func, flash_attn_varlen_func
from gpu.drop_ins.flash_attn.with_kvcache import flash_attn_with_kvcache

FUNCTIONS = (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)


def install() -> None:
    """`from flash_attn import ..` finds our functions from here on, in this process. May be called again.

    Raises RuntimeError where FlashAttention itself is installed, which should be taken out or imported instead.
    """
    found = sys.modules.get("flash_attn")
    if found is None and importlib.util.find_spec("flash_attn") is not None:
        raise RuntimeError("flash_attn: expected no package of that name, found an installed one")
    if found is not None and not hasattr(found, "pkv"):
        raise RuntimeError("flash_attn: expected no module of that name, found one that was imported before")
    module, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    for place in (module, interface):
        place.__dict__.update({function.__name__: function for function in FUNCTIONS}, pkv=True)
    module.__path__, module.flash_attn_interface = [], interface
    for place in (module, interface):
        place.__spec__ = importlib.util.spec_from_loader(place.__name__, None)
        sys.modules[place.__name__] = place
