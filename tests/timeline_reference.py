"""The timeline's laws stepped through slot by slot: at each event every slot is looked at."""
from __future__ import annotations

import numpy as np

from pkvsim import DecodeShape
from pkvsim.pricing_base import query_us
from pkvsim.route_model import RouteModel
from pkvsim.timeline import Timeline


def step_through(
    model: RouteModel, shape: DecodeShape, lane: Timeline, lens: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(start_us, end_us), float64 [num_tasks], of lane's tasks on a route of one launch that takes no time of its
    own."""
    schedule, slots = lane.schedule, lane.num_slots
    count = len(lane.bytes)
    if model.strided:
        ctas = [list(range(cta, count, slots)) for cta in range(min(slots, count))]
    else:
        cuts = schedule.cta_offsets.tolist() if count else [0]
        ctas = [list(range(begin, end)) for begin, end in zip(cuts, cuts[1:])]
    new_cta_us = (0.0 if model.strided else model.task_us) + (model.segment_us if model.rule == "balanced" else 0.0)
    next_us = model.task_us if model.strided else new_cta_us - model.task_us
    queues, running = [[] for _ in range(slots)], [None] * slots  # running: [task, fixed us left, bytes left]
    start, end = np.zeros(count), np.zeros(count)
    c = model.to_row()
    now = query_us(c, np.count_nonzero(lens) * shape.num_q_heads, shape.head_dim, 2)
    while True:
        for slot in range(slots):
            if running[slot] is None:
                fixed = next_us
                if not queues[slot] and ctas:
                    queues[slot], fixed = ctas.pop(0), next_us if model.strided else new_cta_us
                if queues[slot]:
                    task = queues[slot].pop(0)
                    start[task] = now
                    running[slot] = [task, fixed, lane.bytes[task]]
        alive = [state for state in running if state is not None]
        if not alive:
            return start, end
        reading = [state for state in alive if state[1] <= 1e-9]
        speed = min(lane.cta_gb_s, lane.shared_gb_s / max(1, len(reading))) * 1e3
        dt = min([state[1] for state in alive if state[1] > 1e-9] + [state[2] / speed for state in reading])
        now += dt
        for slot, state in enumerate(running):
            if state is None:
                continue
            if state[1] > 1e-9:
                state[1] -= dt
            else:
                state[2] -= dt * speed
                if state[2] <= 1e-3:
                    end[state[0]], running[slot] = now, None
