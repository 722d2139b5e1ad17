"""What it costs to compute the rest of a prompt, by the loop's own prices. Compiled."""
from __future__ import annotations

import numpy as np

from pkvsim.compiled import drop_stale, outer
from pkvsim.outside.step_costs import PARTS, PREFILL_ATTENTION, StepCosts, prefill_attention_us, step_parts

WARM = 1.0  # a GPU that computes a prompt long enough to be loaded is busy


def chunk_table_us(costs: StepCosts, step_tokens: int) -> np.ndarray:
    """us of a step of one chunk of a prompt by its tokens, float64 [2, step_tokens + 1]: of what it computes without
    its attention, and the least, of a prompt's first chunk, which the host may take longer to issue."""
    computed = costs._replace(eager_us=0.0, chunk_eager_us=0.0)
    return np.stack([_chunks_us(computed, step_tokens, False), _chunks_us(costs, step_tokens, True)])


@outer
def _chunks_us(costs, step_tokens, attends):
    us = np.zeros(step_tokens + 1)
    parts = np.zeros(len(PARTS))
    lens, begins, chunk = np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)
    for tokens in range(1, step_tokens + 1):
        chunk[0] = tokens
        us[tokens] = step_parts(costs, lens, begins, chunk, 1, 0.0, WARM, parts)
        if not attends:
            us[tokens] -= parts[PREFILL_ATTENTION]
    return us


@outer
def prompt_us(costs, table_us, begins, end):
    """us to compute tokens [begins[k], end) of a prompt alone on the server, in steps as large as they may be,
    float64 [k]. table_us: of chunk_table_us."""
    step_tokens = table_us.shape[1] - 1
    us = np.zeros(len(begins))
    for at in range(len(begins)):
        tokens = end - begins[at]
        whole = tokens // step_tokens
        rest = tokens - whole * step_tokens
        computed_us = whole * table_us[0, step_tokens] + table_us[0, rest]
        if tokens > 0:
            computed_us += prefill_attention_us(costs, begins[at], tokens, WARM)
        us[at] = max(computed_us, whole * table_us[1, step_tokens] + table_us[1, rest])
    return us


drop_stale("pkvsim")
