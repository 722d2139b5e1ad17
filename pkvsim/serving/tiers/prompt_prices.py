"""What it costs to compute the rest of a prompt, by the loop's own prices. Compiled."""
from __future__ import annotations

import numpy as np

from pkvsim.compiled import drop_stale, outer
from pkvsim.serving.attention import prefill_attention_us


@outer
def prompt_us(attention, linear_us, begins, end):
    """us to compute tokens [begins[k], end) of a prompt alone on the server, in steps as large as they may be,
    float64 [k]. linear_us [step_tokens + 1]: of the layers without attention."""
    step_tokens = len(linear_us) - 1
    us = np.empty(len(begins))
    for at in range(len(begins)):
        tokens = end - begins[at]
        whole = tokens // step_tokens
        us[at] = whole * linear_us[step_tokens] + linear_us[tokens - whole * step_tokens]
        if tokens > 0:
            us[at] += prefill_attention_us(attention, begins[at], tokens)
    return us


drop_stale("pkvsim")
