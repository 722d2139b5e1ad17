"""The serving loop written down plainly: sets, sorting and scans at every step, as a check of the incremental one."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkvsim.outside.step_costs import PARTS, heated, step_parts
from pkvsim.policy.calibrated import CalibratedPolicy
from pkvsim.serving.costs import attention_kinds, outside_costs, page_budget


@dataclass
class Request:
    arrival_us: float  # when it was sent, once it was
    prompt: int
    output: int
    after: int = -1
    think_us: float = 0.0
    sent: bool = False
    cached: int = 0
    generated: int = 0
    pages: int = 0
    decoding: bool = False
    first_us: float = np.nan
    finish_us: float = np.nan
    preemptions: int = 0


def serve(trace, model, device, route: str, config) -> list[Request]:
    """Every request after a run without a prefix cache and without graphs; requests longer than the pool must not be in
    the trace."""
    prices, costs = CalibratedPolicy(), outside_costs(model, device, route, config)
    parts, heat, busy_until = np.zeros(len(PARTS)), 0.0, -1.0
    num_pages = free = page_budget(model, device, config)
    start = trace.arrival_s[0]
    lengths = zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist())
    requests = [Request((at - start) * 1e6, *both) for at, both in zip(trace.arrival_s.tolist(), lengths)]
    if trace.after is not None:
        for request, after, think_us in zip(requests, trace.after.tolist(), trace.think_us.tolist()):
            request.after, request.think_us = after, think_us
    running: set[int] = set()
    queue: list[int] = []  # as sent
    now = slot_us = 0.0

    def due_us(request: Request) -> float:
        if request.after < 0:
            return request.arrival_us
        end_us = requests[request.after].finish_us
        return max(request.arrival_us, end_us + request.think_us) if end_us == end_us else np.nan

    def in_flight() -> int:
        return sum(request.sent and np.isnan(request.finish_us) for request in requests)

    def next_sent() -> tuple[float, int]:
        """When and which request is sent next, as far as is known; infinity where it waits for an end."""
        known = [(due_us(r), i) for i, r in enumerate(requests) if not r.sent]
        known = [(at, i) for at, i in known if at == at]
        if not known or (trace.concurrency is not None and in_flight() >= trace.concurrency):
            return np.inf, -1
        at, i = min(known)
        return max(at, slot_us), i

    def send_until(us: float) -> None:
        while (next_one := next_sent())[0] <= us:
            at, i = next_one
            requests[i].arrival_us, requests[i].sent = at, True
            queue.append(i)

    def pages_of(tokens: int) -> int:
        return -(-tokens // config.page_size)

    while any(np.isnan(request.finish_us) for request in requests):
        send_until(now)
        arrived = [i for i in queue if np.isnan(requests[i].finish_us) and i not in running]
        if not running and not arrived:
            now = next_sent()[0]
            continue
        preempted = False
        for i in sorted(running, key=queue.index):
            request = requests[i]
            while i in running and request.decoding and request.pages < pages_of(request.cached + 1):
                if free:
                    free, request.pages = free - 1, request.pages + 1
                    continue
                preempted, latest = True, max(running, key=queue.index)
                running.remove(latest)
                loser = requests[latest]
                free += loser.pages
                loser.pages = loser.cached = 0
                loser.decoding, loser.preemptions = False, loser.preemptions + 1
        decoders = [i for i in sorted(running, key=queue.index) if requests[i].decoding]
        budget = config.step_tokens - len(decoders)
        begins, chunks = [], []
        for i in [i for i in sorted(running, key=queue.index) if not requests[i].decoding] + ([] if preempted else arrived):
            request = requests[i]
            target = request.prompt + request.generated
            if budget == 0:
                break
            if i not in running:
                keep = int(num_pages * config.profile.keep_free_fraction) if running else 0
                if len(running) == config.max_batch or free < pages_of(target) + keep:
                    break
                running.add(i)
                request.pages = pages_of(target)
                free -= request.pages
            tokens = min(budget, target - request.cached)
            begins.append(request.cached)
            chunks.append(tokens)
            request.cached += tokens
            budget -= tokens
        seen = np.sort(np.array([requests[i].cached + 1 for i in decoders], np.int64))[::-1].copy()
        attention_us = 0.0
        if decoders:
            for shape, options, layers in attention_kinds(model, config.page_size):
                attention_us += prices.decide(shape, seen, device, layers=layers, options=options).prices[route]
        woken = now > busy_until
        heat = 0.0 if woken else heat
        us = step_parts(
            costs, seen, np.array(begins, np.int64), np.array(chunks, np.int64), len(seen) + len(chunks), attention_us,
            heat / costs.boost_us if costs.boost_us else 1.0, parts,
        )
        us *= costs.wake_factor if woken else 1.0
        heat = heated(costs, heat, len(seen) + sum(chunks), us)
        now += us
        busy_until = now
        send_until(now)  # before slots are free
        full = trace.concurrency is not None and in_flight() == trace.concurrency
        for i in sorted(running, key=queue.index):
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
                slot_us = now if full else slot_us
    assert free == num_pages
    return requests
