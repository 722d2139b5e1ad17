"""What would this policy do on that GPU with my traffic? Without a GPU, and without a trace of your own.

Makes up an afternoon of chat traffic, serves it on three GPUs under four policies and prints where the time goes.
With a trace of your own the command does the same: pkvsim whatif --trace FILE --device rtx3060.

    python examples/what_if.py [--requests 1500] [--rate 0.5] [--seed 0]
"""
from __future__ import annotations

import argparse

import numpy as np
from bench.script import one_line_errors

from pkvsim.devices.device import get_device
from pkvsim.models.presets import get_model
from pkvsim.models.weight_bits import with_weight_bits
from pkvsim.reports.table_serving import print_whatif
from pkvsim.serving.server_config import ServingConfig
from pkvsim.studies.whatif import whatif
from pkvsim.traces.requests import RequestTrace

BLOCK_TOKENS = 256
SYSTEM_PROMPTS = 8  # that requests share
SYSTEM_BLOCKS = 4


def chat_trace(requests: int, rate: float, seed: int) -> RequestTrace:
    """Poisson arrivals at `rate` a second; every prompt opens with one of a few system prompts of 1,024 tokens."""
    random = np.random.Generator(np.random.PCG64(seed))
    arrival_s = np.cumsum(random.exponential(1 / rate, requests))
    own = random.lognormal(7, 1, requests).astype(np.int64).clip(16, 16000)  # tokens of the user's own text
    output = random.lognormal(5, 0.8, requests).astype(np.int64).clip(1, 2000)
    prompt = SYSTEM_BLOCKS * BLOCK_TOKENS + own
    blocks = -(-prompt // BLOCK_TOKENS)
    offsets = np.append(0, np.cumsum(blocks))
    hashes = np.arange(offsets[-1]) + SYSTEM_PROMPTS * SYSTEM_BLOCKS  # all different, but for the system prompts
    system = random.integers(0, SYSTEM_PROMPTS, requests)
    for block in range(SYSTEM_BLOCKS):
        hashes[offsets[:-1] + block] = system * SYSTEM_BLOCKS + block
    return RequestTrace("made-up chat", arrival_s, prompt, output, hashes, offsets, BLOCK_TOKENS)


@one_line_errors("what_if")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=0.5, help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    trace = chat_trace(args.requests, args.rate, args.seed)
    model = with_weight_bits(get_model("llama-3.1-8b"), 4)  # 12 GB cards hold it in 4 bits only
    config = ServingConfig(prefix_cache="lru")
    for name in ("rtx3060", "l4", "rtx4090"):
        print_whatif(whatif(trace, model, get_device(name), ["calibrated", "flashinfer", "workqueue", "paper"], config))
        print()


if __name__ == "__main__":
    main()
