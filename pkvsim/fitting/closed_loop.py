"""A closed loop of equal clients on one engine, event by event: mean TTFT and TPOT of fixed lengths. Compiled.

Published serving points are such loops. Between two events (a prompt to compute, a request that ends) every step is
like the one before but for one more token a row, so a run of them costs one price: hundreds of points take a second.
"""
from __future__ import annotations

import numpy as np

from pkvsim.compiled import drop_stale, outer
from pkvsim.outside.step_costs import PARTS, heated, step_parts


@outer
def closed_loop(costs, prompts, outputs, clients, step_tokens, kv_tokens, reserve_output, steps_in_flight, mixes):
    """(mean TTFT in us, mean TPOT in us) of len(prompts) requests [n] int64 that `clients` clients send one after the
    other, all beginning at once.

    kv_tokens: room of the cache. A request is admitted where its prompt, and reserve_output of its output, find room
    beside what the running hold or reserve; where the cache is full all the same, the latest gives way and is computed
    again. steps_in_flight: 2 where what comes while a step runs waits for the next but one. mixes: False where rows do
    not decode in a step that computes prompts. A token reaches its client once the process that streams them has had
    its time for it (costs.token_us), one after the other.
    """
    n = len(prompts)
    cached, target = np.zeros(n, np.int64), prompts.copy()
    left, held = outputs.copy(), np.zeros(n, np.int64)
    sent_us, first_us, tpot = np.zeros(n), np.full(n, np.nan), np.zeros(n)
    ready_step = np.zeros(n, np.int64)
    running, preempted = np.zeros(clients, np.int64), np.zeros(clients, np.int64)
    parts = np.zeros(len(PARTS))
    lens, begins, chunks = np.zeros(clients, np.int64), np.zeros(clients, np.int64), np.zeros(clients, np.int64)
    owners, mine = np.zeros(clients, np.int64), np.zeros(n, np.bool_)
    sent = min(clients, n)
    admitted, rows, away, done, step = 0, 0, 0, 0, 0
    room, now, heat, delivered = kv_tokens, 0.0, 0.0, 0.0
    while done < n:
        decoding, steps = 0, 1 << 40
        for at in range(rows):
            decoding += cached[running[at]] >= target[running[at]]
        gave_way = False
        while rows > 1 and decoding > 0 and room < decoding and reserve_output < 1:
            rows -= 1
            request = running[rows]
            decoding -= cached[request] >= target[request]
            room += held[request]
            target[request] = prompts[request] + outputs[request] - left[request]
            cached[request] = held[request] = 0
            preempted[away] = request
            away += 1
            gave_way = True
        decoding, answered = 0, 0
        for at in range(rows):
            request = running[at]
            if cached[request] >= target[request]:
                lens[decoding] = cached[request] + 1
                answered += outputs[request] - left[request]
                decoding += 1
                steps = min(steps, left[request])
        budget, count, waits = step_tokens - decoding, 0, False
        for at in range(rows):
            request = running[at]
            if cached[request] < target[request] and budget > 0:
                owners[count], begins[count] = request, cached[request]
                chunks[count] = min(budget, target[request] - cached[request])
                budget -= chunks[count]
                count += 1
        if rows == 0 and away == 0:
            now = max(now, sent_us[admitted])
        sent_next = np.inf
        while (away > 0 or admitted < sent) and budget > 0 and rows < clients and not gave_way:
            request = preempted[away - 1] if away > 0 else admitted
            if sent_us[request] > now:
                sent_next = sent_us[request]
                break
            need = target[request] + int(reserve_output * left[request])
            # One that gave way comes back when the others have a page each to grow into, or it would soon go again.
            if need + (16 * rows if away > 0 else 0) > room and rows > 0:
                break
            if ready_step[request] > step and rows > 0:
                waits = True
                break
            room -= need
            held[request] = need
            owners[count], begins[count] = request, 0
            chunks[count] = min(budget, target[request])
            budget -= chunks[count]
            count += 1
            running[rows] = request
            rows += 1
            if away > 0:
                away -= 1
            else:
                admitted += 1
        if count > 0 or waits:
            steps = 1
        elif reserve_output < 1 and decoding > 0:
            steps = max(1, min(steps, room // decoding))
        if count > 0 and not mixes:
            budget += decoding
            decoding, answered = 0, 0
        lens[:decoding] = np.sort(lens[:decoding])[::-1] + (steps - 1) // 2
        warm = heat / costs.boost_us if costs.boost_us > 0 else 1.0
        us = step_parts(costs, lens[:decoding], begins[:count], chunks[:count], decoding + count, 0.0, warm, parts)
        heat = heated(costs, heat, step_tokens - budget, us)
        if steps > 1 and sent_next < np.inf:
            steps = max(1, min(steps, int(np.ceil((sent_next - now) / us))))
        tokens = decoding
        for at in range(count):
            cached[owners[at]] += chunks[at]
            mine[owners[at]] = True
            tokens += cached[owners[at]] == target[owners[at]]
        each_us = costs.token_us
        if decoding > 0:
            each_us += costs.token_place_us * (answered / decoding + (steps - 1) / 2)
        # Either the process that streams tokens falls behind from the first of these steps on, or it waits for each.
        behind_us = max(delivered, now + us) + steps * tokens * each_us
        now += steps * us
        delivered = max(behind_us, now + tokens * each_us)
        step += steps
        kept = 0
        for at in range(rows):
            request = running[at]
            if not mine[request] and decoding == 0:
                running[kept] = request
                kept += 1
                continue
            if not mine[request]:
                cached[request] += steps
                left[request] -= steps
                grown = cached[request] - held[request]
                if grown > 0:
                    held[request] += grown
                    room -= grown
            elif cached[request] == target[request]:
                left[request] -= 1
                if np.isnan(first_us[request]):
                    first_us[request] = delivered
            mine[request] = False
            if left[request] > 0:
                running[kept] = request
                kept += 1
                continue
            tpot[request] = (delivered - first_us[request]) / max(1, outputs[request] - 1)
            room += held[request]
            done += 1
            if sent < n:
                sent_us[sent] = delivered
                ready_step[sent] = step + steps_in_flight - 1
                sent += 1
        rows = kept
    return (first_us - sent_us).mean(), tpot.mean()


drop_stale("pkvsim")
