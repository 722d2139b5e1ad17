"""The timeline's laws stepped through slot by slot: at each event every slot is looked at."""
from __future__ import annotations

import numpy as np

NOTHING = 1e-9  # us or bytes that are left by rounding


def step_through(
    ctas: list[list[int]], sizes: list[float], *, num_slots: int, cta_us: float, task_us: float, alone: float,
    shared: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """(slot, start_us, end_us) [num_tasks] of one launch from time 0.

    ctas: the tasks of each, in the order in which slots take them; sizes: bytes of each task; the rest as run_tasks'.
    """
    waiting, queues = [list(cta) for cta in ctas], [[] for _ in range(num_slots)]
    running = [None] * num_slots  # [task, fixed us left, bytes left]
    slot_of, start, end = np.zeros(len(sizes), int), np.zeros(len(sizes)), np.zeros(len(sizes))
    now = 0.0
    while True:
        for slot in range(num_slots):
            fixed = task_us
            if running[slot] is None and not queues[slot] and waiting:
                queues[slot], fixed = waiting.pop(0), cta_us + task_us
            if running[slot] is None and queues[slot]:
                task = queues[slot].pop(0)
                slot_of[task], start[task] = slot, now
                running[slot] = [task, fixed, float(sizes[task])]
        alive = [state for state in running if state is not None]
        if not alive:
            return slot_of, start, end
        reading = [state for state in alive if state[1] <= NOTHING]
        speed = min(alone, shared / max(1, len(reading)))
        dt = min([state[1] for state in alive if state[1] > NOTHING] + [state[2] / speed for state in reading])
        now += dt
        for slot, state in enumerate(running):
            if state is None:
                continue
            if state[1] > NOTHING:
                state[1] -= dt
            else:
                state[2] -= dt * speed
                if state[2] <= NOTHING:
                    end[state[0]], running[slot] = now, None
