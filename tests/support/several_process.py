"""One rank of two, under torchrun: symmetric memory and NCCL give the bits that one process gives; or a peer is killed."""
from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from decode_ref import check, make_case
from several_ranks import RankArrays

from gpu.several import CollectiveGroup, RankLost, ShardedDecode, SymmetricGroup
from pkvsim import DecodeShape

SHAPE = DecodeShape(32, 8, 128, 16)


def whole(arrays: RankArrays, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What all ranks own, put together on each."""
    found = []
    for mine in (arrays.out, arrays.lse):
        (one,) = mine.values()
        parts = [torch.empty_like(one) for _ in range(ranks)]
        dist.all_gather(parts, one)
        result = parts[0].clone()
        for rank, part in enumerate(parts):
            rows, heads = arrays.engine.owned(rank, len(one))
            at = slice(rows.start, rows.stop), slice(heads.start, heads.stop)
            result[at] = part[at]
        found.append(result)
    return found[0], found[1]


def main() -> None:
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    kill = "--kill" in sys.argv
    found = {}
    side = torch.cuda.Stream()
    for name, group in (("symmetric", SymmetricGroup()), ("collective", CollectiveGroup())):
        for owner in ("head", "row", "all"):
            with torch.cuda.stream(side):
                engine = ShardedDecode(SHAPE, group=group, owner=owner, max_batch=16, timeout_s=1.0)
                arrays = RankArrays(engine, make_case(SHAPE, (9000, 3, 700, 0, 1500), seed=4))
                arrays.plan(validate=True)
                for _ in range(3):
                    arrays.launch(rank)
                engine.synchronize()
            if kill:
                sys.stdout.flush()
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                begin = time.perf_counter()
                try:
                    with torch.cuda.stream(side):
                        arrays.launch(rank)
                        engine.synchronize()
                except RankLost as error:
                    print(f"rank {rank}: RankLost after {time.perf_counter() - begin:.2f} s: {error}", flush=True)
                os._exit(1)
            dist.barrier()
            found[name, owner] = whole(arrays, ranks)
    check(*found["symmetric", "head"], arrays.case, dtype="float16")
    first = found["symmetric", "head"]
    assert all(torch.equal(a, b) for pair in found.values() for a, b in zip(pair, first))
    print(f"rank {rank}: all alike", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
