"""What it costs to compute the rest of a prompt, by the loop's own prices. Compiled."""
from __future__ import annotations

import math

import numpy as np

from pkvsim.compiled import drop_stale, inner, outer
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
        begin, tokens = begins[at], end - begins[at]
        whole = tokens // step_tokens
        rest = tokens - whole * step_tokens
        if whole > 0:
            us[at] = _whole_steps_us(costs, table_us, begin, whole)
        if rest > 0:
            attention_us = prefill_attention_us(costs, begin + whole * step_tokens, rest, WARM)
            us[at] += max(table_us[0, rest] + attention_us, table_us[1, rest])
    return us


@inner
def _whole_steps_us(costs, table_us, begin, steps):
    """Of steps of whole chunks one after the other. Their attention grows by as much from each to the next, so that the
    host, which bounds the first ones, hands over to it once."""
    step_tokens = table_us.shape[1] - 1
    computed_us, least_us = table_us[0, step_tokens], table_us[1, step_tokens]
    first_us = prefill_attention_us(costs, begin, step_tokens, WARM)
    last_us = prefill_attention_us(costs, begin + (steps - 1) * step_tokens, step_tokens, WARM)
    growth_us = (last_us - first_us) / max(1, steps - 1)
    short_us = least_us - computed_us - first_us  # by which attention is too short for the first step
    bound = 0
    if short_us > 0:
        bound = steps if growth_us <= 0 or short_us > (steps - 1) * growth_us else math.ceil(short_us / growth_us)
    rest = steps - bound
    return bound * least_us + rest * (computed_us + first_us + growth_us * (bound + steps - 1) / 2)


drop_stale("pkvsim")
