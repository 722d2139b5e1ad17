"""Decode over the GPUs of a host, from one process and under torchrun; skipped where there is one GPU."""
from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from decode_ref import check, make_case
from delayed_ranks import run_delayed_steps
from several_ranks import RankArrays

from gpu.measure.timing import capture
from gpu.several import DeviceGroup, RankLost, ShardedDecode
from pkvsim import DecodeShape

ROOT = Path(__file__).resolve().parents[3]
COUNT = torch.cuda.device_count()
SHAPE = DecodeShape(32, 8, 128, 16)
pytestmark = pytest.mark.skipif(COUNT < 2, reason="needs two GPUs")


@pytest.mark.parametrize("owner", ["head", "row", "all"])
def test_devices_of_one_process(owner: str) -> None:
    engine = ShardedDecode(SHAPE, group=DeviceGroup(range(COUNT)), owner=owner, max_batch=16)
    for seed, lens in enumerate(((9000, 3, 700, 0), (1500,) * 16, (40000,))):
        arrays = RankArrays(engine, make_case(SHAPE, lens, seed=seed))
        arrays.plan(validate=True)
        first = arrays.run()
        check(*first, arrays.case, dtype="float16")
        graphs = {}
        for rank in range(COUNT):
            with engine.group.use(rank):
                graphs[rank] = capture(lambda rank=rank, arrays=arrays: [arrays.launch(rank) for _ in range(5)])
        arrays.poison()
        for _ in range(20):
            for rank in range(COUNT):
                with engine.group.use(rank):
                    graphs[rank].replay()
        engine.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(arrays.together(), first))


@pytest.mark.parametrize("owner", ["head", "row", "all"])
def test_a_device_that_is_late_at_random(owner: str) -> None:
    engine = ShardedDecode(SHAPE, group=DeviceGroup(range(COUNT)), owner=owner, max_batch=4)
    arrays = RankArrays(engine, make_case(SHAPE, (9000, 700, 33, 5000), seed=6))
    arrays.plan()
    run_delayed_steps(arrays, [(9000, 700, 33, 5000), (1, 0, 33, 16), (8000, 700, 0, 2300), (0, 0, 0, 4999)],
                      np.random.default_rng(5))


def test_a_device_that_stops_ends_the_others() -> None:
    engine = ShardedDecode(SHAPE, group=DeviceGroup(range(COUNT)), max_batch=4, timeout_s=0.4)
    arrays = RankArrays(engine, make_case(SHAPE, (900, 20), seed=3))
    arrays.plan()
    arrays.run()
    begin = time.perf_counter()
    with engine.group.use(0):
        arrays.launch(0)
    with pytest.raises(RankLost):
        engine.synchronize()
    assert time.perf_counter() - begin < 1.5


SCRIPT = ROOT / "tests/support/several_process.py"
ENV = os.environ | {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0", "MASTER_ADDR": "127.0.0.1",
                    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}


def free_port() -> str:
    """One that nobody listens on, so that two runs of these tests on one machine do not meet."""
    with socket.socket() as unbound:
        unbound.bind(("127.0.0.1", 0))
        return str(unbound.getsockname()[1])


def test_a_process_for_each_gpu() -> None:
    """Symmetric memory and NCCL give the same bits."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(SCRIPT)], env=ENV, capture_output=True, text=True, timeout=240, check=False)
    told = done.stdout + done.stderr
    assert done.returncode == 0 and told.count("all alike") == 2, told[-4000:]


def test_a_killed_process_ends_the_other() -> None:
    port = free_port()
    processes = [subprocess.Popen([sys.executable, str(SCRIPT), "--kill"], stdout=subprocess.PIPE, text=True,
                                  stderr=subprocess.STDOUT,
                                  env=ENV | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": port})
                 for rank in "01"]
    try:
        told = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()  # a rank that hangs would keep its GPU
    assert "rank 0: RankLost after 1." in told[0], told
