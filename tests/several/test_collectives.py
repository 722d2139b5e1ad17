"""Groups of collectives on CPU processes: the states that gloo carries lie where pkv_merge_ranks looks for them."""
from __future__ import annotations

import os
import socket

import pytest

from gpu.several.inbox import OWNERS, owned_places

torch = pytest.importorskip("torch")
SIZE, BATCH, HEADS = 32, 3, 4  # bytes of a state


def state(rank: int, place: int):
    return torch.arange(SIZE, dtype=torch.uint8) + 16 * rank + 3 * place


def one_rank(rank: int, ranks: int, port: int, errors) -> None:
    import torch.distributed as dist

    from gpu.several.collectives import CollectiveGroup

    try:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        group = CollectiveGroup()
        assert (group.num_ranks, group.ranks, group.in_kernel) == (ranks, (rank,), False)
        group.barrier()
        sent = torch.cat([state(rank, place) for place in range(BATCH * HEADS)])
        for owner in OWNERS:
            places = [owned_places(owner, r, num_ranks=ranks, batch_size=BATCH, num_kv_heads=HEADS) for r in range(ranks)]
            begin, end = places[rank]
            received = torch.zeros(ranks * (end - begin) * SIZE, dtype=torch.uint8)
            counts = None if owner == "all" else (
                tuple((last - first) * SIZE for first, last in places), ((end - begin) * SIZE,) * ranks)
            group.exchange(rank, sent, received, counts)
            found = received.view(ranks, end - begin, SIZE)
            for source in range(ranks):
                for place in range(begin, end):
                    assert torch.equal(found[source, place - begin], state(source, place)), (owner, source, place)
        dist.destroy_process_group()
        errors.put(None)
    except BaseException as error:
        errors.put(f"rank {rank}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("ranks", [3])
def test_every_rank_gets_the_states_of_what_it_owns(ranks: int) -> None:
    import torch.multiprocessing as processes

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = processes.get_context("fork")
    errors = context.Queue()
    # Daemons: where one fails, the others would wait for it beyond this test.
    started = [context.Process(target=one_rank, args=(rank, ranks, port, errors), daemon=True) for rank in range(ranks)]
    for process in started:
        process.start()
    told = [errors.get(timeout=120) for _ in started]
    for process in started:
        process.join(timeout=60)
    assert told == [None] * ranks


def test_a_group_needs_torch_distributed() -> None:
    from gpu.several.collectives import CollectiveGroup

    with pytest.raises(ValueError, match="^process_group"):
        CollectiveGroup()


@pytest.mark.parametrize("device", ["cuda:1", -1, 2, 1.0])
def test_a_device_that_is_not_there_is_refused(monkeypatch, device) -> None:
    from gpu.several.symmetric_memory import SymmetricGroup

    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 1)):
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value: value)
    for name, value in (("is_available", True), ("current_device", 0), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert SymmetricGroup().device(1) == 0 and SymmetricGroup(device=1).device(1) == 1
    with pytest.raises(ValueError, match=r"^device: expected an integer in \[0, 1\]"):
        SymmetricGroup(device=device)
