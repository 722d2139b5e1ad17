"""python -m gpu.as_card CARD SCRIPT [ARGS]: runs a script as another GPU of the catalogue would run it.

    python -m gpu.as_card rtx3060 examples/quickstart.py --steps 50
    python -m gpu.as_card rtx3060 -m gpu.tune -o table.json
    python -m pytest tests/gpu --card rtx3060

Every kernel that CuPy compiles is PTX of the card's architecture, which the driver compiles for the GPU at hand;
schedules are for its SMs; kernels have its shared memory, launches its features; PyTorch and CuPy together get no more
memory than it has. So what the card would refuse is refused, and what it would compute is computed. How fast it would
be does not show: times are those of the GPU at hand. What comes compiled, in PyTorch and FlashInfer, runs as it is.

The peak of the process's GPU memory is the last line, on standard error. Limits hold for each process: of pytest -n 14
every worker is a card of its own.
"""
from __future__ import annotations

import argparse
import dataclasses
import runpy
import sys
from pathlib import Path

from gpu.kernels import this_gpu
from gpu.kernels.this_gpu import Gpu
from gpu.measure import memory
from pkvsim.devices.device import DEVICES, get_device

OLDEST = (8, 0)
# What a driver, a context and the desktop keep of a consumer card's memory: an assumption, on the large side.
KEPT_BYTES = 512 << 20


def card_named(name: str) -> Gpu:
    """A card of the catalogue, or of a device file. Raises ValueError naming the card."""
    spec = get_device(name)
    if spec.compute_capability < OLDEST:
        major, minor = spec.compute_capability
        raise ValueError(f"card: expected compute capability 8.0 or newer, got {name} of {major}.{minor}")
    major, minor = spec.compute_capability
    return Gpu(name=spec.label, compute_capability=major * 10 + minor, num_sms=spec.num_sms,
               memory_bytes=int(spec.memory_gib * 2**30) - KEPT_BYTES)


def enter(name: str) -> Gpu:
    """Makes this process play the card, until it ends. To be called before the first kernel.

    Raises ValueError naming the card where the GPU at hand cannot play it: a newer one, or one of more memory.
    """
    import cupy
    import torch

    card, real = card_named(name), this_gpu.real_gpu()
    if card.compute_capability > real.compute_capability:
        raise ValueError(f"card: expected one of compute capability {real.compute_capability / 10:.1f} or older, which "
                         f"{real.name} can play, got {name} of {card.compute_capability / 10:.1f}")
    if card.memory_bytes > real.memory_bytes:
        raise ValueError(f"card: expected one of at most {real.memory_bytes / 2**30:.1f} GiB, which {real.name} has, "
                         f"got {name} of {card.memory_bytes / 2**30:.1f}")
    card = dataclasses.replace(card, played_by=real.name, card=name)
    this_gpu.play(card)
    _compile_for(card, cupy.cuda.compiler)
    _Memory(card.memory_bytes, cupy, torch).install()
    return card


def _compile_for(card: Gpu, compiler: object) -> None:
    """CuPy 13 and 14 ask this function of theirs for every compilation and for the name it is kept under on disk."""
    chosen = f"-arch=compute_{card.compute_capability}", "ptx"
    compiler._get_arch_for_options_for_nvrtc = lambda arch=None: chosen


class _Memory:
    """Holds PyTorch and CuPy together to the card's memory, and has both say so.

    CuPy gets a pool that asks here for every block by which it grows and gives back here what it lets go of. PyTorch's
    own limit follows. An allocation that the pool serves from what it holds comes by none of this: asking PyTorch for
    its statistics takes longer than the allocation and makes 250 Python objects, of which a circle stays as garbage.
    """

    __slots__ = ("_limit", "_cupy", "_torch", "_total", "_sizes", "_taken")

    def __init__(self, limit: int, cupy: object, torch: object) -> None:
        self._limit, self._cupy, self._torch = limit, cupy, torch
        self._total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        self._sizes: dict[int, int] = {}  # bytes of the pool's blocks, by address
        self._taken = 0  # bytes of them together

    def install(self) -> None:
        cuda = self._cupy.cuda
        self._limit_torch()
        pool = cuda.MemoryPool(cuda.PythonFunctionAllocator(self.grow, self.shrink).malloc)
        cuda.set_allocator(pool.malloc)
        self._cupy.get_default_memory_pool = lambda: pool
        self._torch.cuda.mem_get_info = lambda device=None: self.info()
        properties = self._torch.cuda.get_device_properties
        self._torch.cuda.get_device_properties = lambda device=None: _Properties(properties(device), self._limit)
        cuda.runtime.memGetInfo = self.info

    def grow(self, num_bytes: int, device_id: int) -> int:
        """The address of another block for CuPy's pool, which PyTorch must have left room for.

        Raises cupy.cuda.runtime.CUDARuntimeError as a full GPU does: CuPy then gives back the blocks that it does not
        use, asks again, and raises its OutOfMemoryError only then.
        """
        runtime = self._cupy.cuda.runtime
        if self._taken + num_bytes > self._limit - self._torch.cuda.memory_reserved():
            raise runtime.CUDARuntimeError(runtime.errorMemoryAllocation)
        address = runtime.malloc(num_bytes)
        self._sizes[address] = num_bytes
        self._taken += num_bytes
        self._limit_torch()
        return address

    def shrink(self, address: int, device_id: int) -> None:
        """Frees a block that CuPy's pool has let go of. What the interpreter's end lets go of the driver frees."""
        if sys.is_finalizing():
            return
        self._cupy.cuda.runtime.free(address)
        self._taken -= self._sizes.pop(address)
        self._limit_torch()

    def info(self) -> tuple[int, int]:
        """(free, total) bytes of the card, as far as this process fills it."""
        used = self._taken + self._torch.cuda.memory_reserved()
        return max(0, self._limit - used), self._limit

    def _limit_torch(self) -> None:
        """PyTorch gets what CuPy's pool leaves."""
        self._torch.cuda.set_per_process_memory_fraction(max(0.0, (self._limit - self._taken) / self._total))


class _Properties:
    """torch.cuda.get_device_properties() of the GPU at hand, but for the memory that Transformers sizes pools by."""

    def __init__(self, real: object, total_memory: int) -> None:
        self._real, self.total_memory = real, total_memory

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):  # an instance that is only being copied has no _real yet
            raise AttributeError(name)
        return getattr(self._real, name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu.as_card", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python -m gpu.as_card CARD [-m MODULE | SCRIPT] [ARGS]")
    parser.add_argument("card", help=f"of {', '.join(DEVICES)}, or a device file")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a script, or -m and a module, and its arguments")
    args = parser.parse_args(argv)
    module = args.command[:1] == ["-m"]
    command = args.command[module:]
    if not command:
        parser.error("expected a script, or -m and a module, behind the card")
    from gpu.measure.environment import lacks_gpu

    if lacks_gpu("gpu.as_card"):
        return 1
    try:
        enter(args.card)
    except ValueError as error:
        parser.error(str(error))
    sys.argv = command
    try:
        if module:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(command[0]).resolve().parent))
            runpy.run_path(command[0], run_name="__main__")
    finally:  # also of a script that was interrupted
        print(f"as {args.card}: {memory.peak_line()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
