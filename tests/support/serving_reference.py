"""The serving loop written down plainly: sets, sorting and scans at every step, as a check of the incremental one."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkvsim.models.presets import kv_bytes_per_token
from pkvsim.policy.calibrated import CalibratedPolicy
from pkvsim.serving.costs import attention_kinds, linear_table_us, page_budget


@dataclass
class Request:
    arrival_us: float
    prompt: int
    output: int
    cached: int = 0
    generated: int = 0
    pages: int = 0
    decoding: bool = False
    first_us: float = np.nan
    finish_us: float = np.nan
    preemptions: int = 0


def serve(trace, model, device, route: str, config) -> list[Request]:
    """Every request after a run without a prefix cache; requests longer than the pool must not be in the trace."""
    prices, linear_us = CalibratedPolicy(), linear_table_us(model, device, config)
    peak = device.fp16_tflops * config.prefill_attention_efficiency * 1e6
    layer_kv_us = kv_bytes_per_token(model) / model.num_layers / (device.beta_gb_s * 1e3)
    num_pages = free = page_budget(model, device, config)
    start = trace.arrival_s[0]
    lengths = zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist())
    requests = [Request((at - start) * 1e6, *both) for at, both in zip(trace.arrival_s.tolist(), lengths)]
    running: set[int] = set()
    now = 0.0

    def pages_of(tokens: int) -> int:
        return -(-tokens // config.page_size)

    def chunk_us(begin: int, tokens: int) -> float:
        us = 0.0
        for layers, window in ((model.num_full_layers, 1 << 40), (model.num_sliding_layers, model.sliding_window)):
            pairs = sum(min(at + 1, window) for at in range(begin, begin + tokens))
            flops_us = 4 * model.num_q_heads * model.head_dim * pairs / peak
            us += layers * max(flops_us, (min(begin, window) + tokens) * layer_kv_us)
        return us

    while any(np.isnan(request.finish_us) for request in requests):
        waiting = [i for i, r in enumerate(requests) if np.isnan(r.finish_us) and i not in running]
        arrived = [i for i in waiting if requests[i].arrival_us <= now]
        if not running and not arrived:
            now = requests[waiting[0]].arrival_us
            continue
        preempted = False
        for i in sorted(running):
            request = requests[i]
            while i in running and request.decoding and request.pages < pages_of(request.cached + 1):
                if free:
                    free, request.pages = free - 1, request.pages + 1
                    continue
                preempted, latest = True, max(running)
                running.remove(latest)
                loser = requests[latest]
                free += loser.pages
                loser.pages = loser.cached = 0
                loser.decoding, loser.preemptions = False, loser.preemptions + 1
        decoders = [i for i in sorted(running) if requests[i].decoding]
        budget = config.step_tokens - len(decoders)
        us = 0.0
        prefilled = 0
        for i in [i for i in sorted(running) if not requests[i].decoding] + ([] if preempted else arrived):
            request = requests[i]
            target = request.prompt + request.generated
            if budget == 0:
                break
            if i not in running:
                keep = int(num_pages * config.keep_free_fraction) if running else 0
                if len(running) == config.max_batch or free < pages_of(target) + keep:
                    break
                running.add(i)
                request.pages = pages_of(target)
                free -= request.pages
            tokens = min(budget, target - request.cached)
            us += chunk_us(request.cached, tokens)
            request.cached += tokens
            prefilled += tokens
            budget -= tokens
        if decoders:
            seen = np.array([requests[i].cached + 1 for i in decoders])
            for shape, options, layers in attention_kinds(model, config.page_size):
                us += prices.decide(shape, seen, device, layers=layers, options=options).prices[route]
        now += us + linear_us[len(decoders) + prefilled] + config.host_us
        for i in sorted(running):
            request = requests[i]
            if request.decoding:
                request.cached += 1
            elif request.cached < request.prompt + request.generated:
                continue
            request.decoding = True
            request.generated += 1
            if np.isnan(request.first_us):
                request.first_us = now
            if request.generated == request.output:
                request.finish_us = now
                running.remove(i)
                free += request.pages
    assert free == num_pages
    return requests
