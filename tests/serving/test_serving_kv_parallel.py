"""Servers whose GPUs hold the rows' KV together, against a plain statement of their arithmetic."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from serving_cases import DEVICE, GPT_OSS, MODEL, make_trace

from pkvsim.policy.by_name import make_policy
from pkvsim.pricing.kv_parallel import exchange_us
from pkvsim.serving.costs import attention_kinds, page_budget
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_step_is_the_slowest_gpus_and_an_exchange(ranks) -> None:
    """Two rows that decode alone, step by step."""
    config = ServingConfig(kv_parallel=ranks, max_batch=4, step_tokens=8192, kv_gib=4.0, graphs=False)
    prompts, outputs = (5000, 37), (30, 30)
    result = simulate(make_trace([(0.0, *row) for row in zip(prompts, outputs)]), MODEL, DEVICE, "balanced", config)
    ((shape, options, layers),) = attention_kinds(MODEL, 16)
    policy, us, best_us = make_policy("balanced"), 0.0, 0.0
    for step in range(1, 30):
        lens = [prompt + step for prompt in prompts]
        # Page p of a row lies on GPU p modulo their number; GPU 0 has its tokens for which that is 0.
        own = [sum(token // 16 % ranks == 0 for token in range(length)) for length in lens]
        prices = policy.decide(shape, np.array(own, np.int32), DEVICE, layers=layers, options=options).prices
        exchanges_us = layers * float(exchange_us(shape, 2, DEVICE, ranks))
        us, best_us = us + prices["balanced"] + exchanges_us, best_us + min(prices.values()) + exchanges_us
    assert result.totals["attention_us"] == pytest.approx(us, rel=1e-9)
    assert result.totals["best_attention_us"] == pytest.approx(best_us, rel=1e-9)


def test_pages_of_all_gpus_are_a_servers() -> None:
    one = ServingConfig(kv_gib=2.0)
    assert page_budget(MODEL, DEVICE, replace(one, kv_parallel=3)) == 3 * page_budget(MODEL, DEVICE, one)
    assert page_budget(MODEL, DEVICE, ServingConfig(kv_parallel=2)) == 2 * page_budget(MODEL, DEVICE, ServingConfig())


@pytest.mark.parametrize(("model", "policy", "more", "name"), [
    (MODEL, "calibrated", {"kv_parallel": 2}, "policies"), (GPT_OSS, "balanced", {"kv_parallel": 2}, "kv_parallel"),
    (MODEL, "balanced", {"kv_parallel": 9}, "kv_parallel"), (MODEL, "balanced", {"kv_parallel": 0}, "kv_parallel"),
    (MODEL, "balanced", {"kv_parallel": 2, "query_tokens": 2, "acceptance": 0.5}, "query_tokens"),
])
def test_what_cannot_be_is_refused_by_name(model, policy, more, name) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        simulate(make_trace([(0.0, 10, 2)]), model, DEVICE, policy, ServingConfig(**more))
