"""Captured steps of random lengths, of which one rank is late at random."""
from __future__ import annotations

import os
from collections.abc import Sequence

import cupy
import numpy as np
import torch
from decode_ref import Case, check
from several_ranks import RankArrays

from gpu.measure.timing import capture

DELAYED_STEPS = int(os.environ.get("PKV_DELAYED_STEPS", "2000"))
CALLS = 20  # steps of a graph
MEAN_DELAY_CYCLES = 100_000  # several graphs' time


def run_delayed_steps(arrays: RankArrays, lengths: Sequence[Sequence[int]], rng: np.random.Generator) -> None:
    """DELAYED_STEPS steps of the planned case of `arrays`; between graphs its rows take one of `lengths`, in place.

    Every length must lie within the case's table. Outputs must be, to the bit, what the same lengths gave before any
    rank was late, and no memory may be taken.
    """
    engine, case = arrays.engine, arrays.case
    lens = [{rank: torch.tensor(one, dtype=torch.int32, device=arrays.lens[rank].device) for rank in arrays.group.ranks}
            for one in lengths]
    wanted = []
    for one in lens:
        set_lengths(arrays, one)
        arrays.poison()
        wanted.append(arrays.run())
        check(*wanted[-1], Case(case.shape, case.q, case.k_pages, case.v_pages, case.block_table,
                                one[arrays.group.ranks[0]].to(case.seq_lens.device)), dtype="float16")
    used = cupy.get_default_memory_pool().used_bytes()
    graphs = {}
    for rank in arrays.group.ranks:
        with arrays.group.use(rank):
            graphs[rank] = capture(lambda rank=rank: [arrays.launch(rank) for _ in range(CALLS)])
    replays = -(-DELAYED_STEPS // CALLS)
    for replay in range(replays):
        which, late = int(rng.integers(len(lens))), int(rng.integers(len(arrays.group.ranks)))
        for rank in arrays.group.ranks:
            with arrays.group.use(rank):
                if rank == late:
                    torch.cuda._sleep(int(rng.exponential(MEAN_DELAY_CYCLES)))
                arrays.lens[rank].copy_(lens[which][rank])
                graphs[rank].replay()
        if replay % 50 == 49 or replay == replays - 1:
            engine.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(arrays.together(), wanted[which]))
    assert cupy.get_default_memory_pool().used_bytes() == used


def set_lengths(arrays: RankArrays, lens: dict[int, torch.Tensor]) -> None:
    for rank in arrays.group.ranks:
        arrays.lens[rank].copy_(lens[rank])
    arrays.synchronize()
