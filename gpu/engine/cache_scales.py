"""The scales of an 8-bit cache on their way into a decode launch. Needs neither CuPy nor a GPU."""
from __future__ import annotations

import math

import numpy as np

from gpu.inputs.arrays import ArrayView
from gpu.inputs.checks import MAX_FLOAT32, expect
from pkvsim import DecodeShape
from pkvsim.options import AttentionOptions

NO_STRIDES = (0, 0, 0)
LEAST_SCALE = 2.0**-126  # smaller ones are 0 to the GPU


def split(name: str, scale: object, options: AttentionOptions) -> tuple[float, object]:
    """(number, None) or (1, array) of a run's k_scale or v_scale.

    Raises ValueError naming the argument that is neither, or not what the options say.
    """
    number = isinstance(scale, (int, float, np.number)) and not isinstance(scale, bool)
    if options.kv_dtype is None:
        expect(name, "None, without kv_dtype", repr(scale), scale is None)
    elif options.kv_scales != "tensor":
        wanted = f"float32 on the GPU, a scale of every {options.kv_scales}"
        expect(name, wanted, repr(scale) if number else type(scale).__name__, scale is not None and not number)
    elif scale is None or number:
        expect(name, "a positive number in the range of float32, or one float32 on the GPU", scale,
               scale is None or LEAST_SCALE <= scale <= MAX_FLOAT32)
        return 1.0 if scale is None else float(scale), None
    return 1.0, scale


def check(k: ArrayView | None, v: ArrayView | None, shape: DecodeShape, options: AttentionOptions, layout: str,
          num_pages: int) -> tuple[int, int, int]:
    """Strides of pages, heads and tokens of scales that are arrays, in elements; 0 where they have none.

    Raises ValueError naming the argument.
    """
    heads, slots = shape.num_kv_heads, shape.page_size
    inner = (heads, slots) if layout == "HND" else (slots, heads)
    shaped = {"page": (num_pages, heads), "token": (num_pages, *inner)}.get(options.kv_scales)
    for name, array in (("k_scale", k), ("v_scale", v)):
        if shaped is not None:
            expect(name, f"float32 {list(shaped)}", array, array.dtype == "float32" and array.shape == shaped)
            expect(name, "head and token strides of 0 to 2^31 - 1 elements", f"strides {array.strides}",
                   all(0 <= stride < 2**31 for stride in array.strides[1:]))
        elif array is not None:
            expect(name, "a number or one float32", array, array.dtype == "float32" and math.prod(array.shape) == 1)
    if shaped is None:
        return NO_STRIDES
    expect("v_scale", f"the strides of k_scale, {k.strides}", v.strides, v.strides == k.strides)
    page, *within = k.strides
    if options.kv_scales == "page":
        return page, within[0], 0
    head, token = within if layout == "HND" else reversed(within)
    return page, head, token
