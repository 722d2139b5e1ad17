"""A process that plays another card: what the engine sees, what CuPy compiles for, how much memory there is."""
from __future__ import annotations

import copy
import gc
import itertools
import runpy
import sys
import types

import pytest
from fake_gpu import fake_gpu

from gpu import as_card
from gpu.kernels import this_gpu
from gpu.kernels.variant import shared_limit_bytes
from pkvsim import DecodeShape
from pkvsim.devices.device import DEVICES

GIB = 2**30
SHAPE = DecodeShape(32, 8, 128, 16)
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class FullGpu(Exception):
    """CuPy's CUDARuntimeError; status: what the driver gave."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class FakeAllocator:
    """CuPy's PythonFunctionAllocator: a block is (its address, what frees it)."""

    def __init__(self, malloc, free) -> None:
        self._malloc, self._free = malloc, free

    def malloc(self, num_bytes: int) -> tuple:
        return self._malloc(num_bytes, 0), self._free


class FakePool:
    """A pool of CuPy's: serves an allocation from a free block of its size or grows by one; an allocation's address.

    As CuPy 13 and 14 do, it gives back its free blocks where a block is refused for want of memory, and asks again.
    """

    def __init__(self, allocator) -> None:
        self._allocator, self._free, self._used = allocator, [], {}  # blocks: (bytes, block)

    def malloc(self, num_bytes: int) -> int:
        found = next((kept for kept in self._free if kept[0] == num_bytes), None)
        if found is None:
            found = num_bytes, self._grow(num_bytes)
        else:
            self._free.remove(found)
        self._used[found[1][0]] = found
        return found[1][0]

    def _grow(self, num_bytes: int) -> tuple:
        try:
            return self._allocator(num_bytes)
        except FullGpu as error:
            assert error.status == OUT_OF_MEMORY
            self.free_all_blocks()
        try:
            return self._allocator(num_bytes)
        except FullGpu:
            raise MemoryError(num_bytes) from None

    def free(self, address: int) -> None:
        self._free.append(self._used.pop(address))

    def free_all_blocks(self) -> None:
        while self._free:
            address, free = self._free.pop()[1]
            free(address, 0)

    def total_bytes(self) -> int:
        return sum(size for size, _ in (*self._free, *self._used.values()))


class FakeTorch(types.ModuleType):
    """PyTorch as far as its memory goes: reserve() is an allocation."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.reserved, self.fraction, self.total, self.asked = 0, 1.0, 140 * GIB, 0
        properties = types.SimpleNamespace(total_memory=self.total, name="Fake GPU")
        self.cuda = types.SimpleNamespace(
            current_device=lambda: 0, get_device_properties=lambda device: properties,
            memory_reserved=self._memory_reserved, set_per_process_memory_fraction=self._set)

    def _memory_reserved(self) -> int:
        self.asked += 1
        return self.reserved

    def _set(self, fraction: float) -> None:
        self.asked += 1
        assert 0 <= fraction <= 1
        self.fraction = fraction

    def reserve(self, num_bytes: int) -> None:
        if self.reserved + num_bytes > self.fraction * self.total + 1:
            raise MemoryError(num_bytes)
        self.reserved += num_bytes


@pytest.fixture
def machine(monkeypatch):
    """An H200 with both libraries."""
    with fake_gpu(compute_capability=90, num_sms=132, memory_bytes=140 * GIB) as gpu:
        torch = FakeTorch()
        cuda, addresses, blocks = gpu.cupy.cuda, itertools.count(2**40), set()
        cuda.MemoryPool, cuda.PythonFunctionAllocator = FakePool, FakeAllocator
        cuda.set_allocator = lambda allocate: setattr(gpu.cupy, "allocate", allocate)
        cuda.compiler = types.SimpleNamespace()

        def malloc(num_bytes: int) -> int:
            blocks.add(address := next(addresses))
            return address

        vars(cuda.runtime).update(malloc=malloc, free=blocks.remove, CUDARuntimeError=FullGpu,
                                  errorMemoryAllocation=OUT_OF_MEMORY)
        monkeypatch.setitem(sys.modules, "torch", torch)
        gpu.torch = torch
        yield gpu
        this_gpu.play(None)


@pytest.mark.parametrize("name", [name for name, spec in DEVICES.items() if spec.compute_capability <= (9, 0)])
def test_the_engine_is_the_cards(machine, name) -> None:
    spec = DEVICES[name]
    card = as_card.enter(name)
    from gpu.decode_engine import DecodeEngine

    engine = DecodeEngine(SHAPE).schedule_engine
    major, minor = spec.compute_capability
    assert this_gpu.this_gpu() is card and engine.num_ctas == spec.num_sms
    assert card.compute_capability == major * 10 + minor and card.overlaps == (major >= 9)
    assert engine.config.shared_bytes <= shared_limit_bytes(card.compute_capability) <= spec.smem_per_sm_kib * 1024
    assert spec.label in str(card) and "Fake GPU" in str(card), "times are those of the GPU that plays"
    options = machine.cupy.cuda.compiler._get_arch_for_options_for_nvrtc
    assert options() == options("90") == (f"-arch=compute_{major}{minor}", "ptx")


def test_both_libraries_share_the_cards_memory(machine) -> None:
    limit = as_card.enter("rtx3060").memory_bytes
    assert limit == 12 * GIB - as_card.KEPT_BYTES
    cupy, torch = machine.cupy, machine.torch
    assert torch.cuda.mem_get_info() == cupy.cuda.runtime.memGetInfo() == (limit, limit)
    told = copy.copy(torch.cuda.get_device_properties())
    assert (told.total_memory, told.name) == (limit, "Fake GPU")
    with pytest.raises(MemoryError):
        torch.reserve(12 * GIB)
    cupy.allocate(5 * GIB)
    assert torch.cuda.mem_get_info(0) == (limit - 5 * GIB, limit)
    with pytest.raises(MemoryError):
        torch.reserve(7 * GIB)
    torch.reserve(6 * GIB)
    with pytest.raises(MemoryError):
        cupy.allocate(GIB)
    assert torch.cuda.mem_get_info() == (limit - 11 * GIB, limit)


def test_pytorch_is_asked_only_where_the_pool_grows_or_shrinks(machine) -> None:
    """A step's allocations, which CuPy serves from what it holds, cost no host time and leave nothing behind."""
    limit = as_card.enter("rtx3060").memory_bytes
    cupy, torch = machine.cupy, machine.torch
    pool, sizes = cupy.get_default_memory_pool(), (4096, 512, 65536)

    def step() -> None:
        for address in [cupy.allocate(size) for size in sizes]:
            pool.free(address)

    step()
    asked = torch.asked
    gc.collect()
    gc.disable()
    try:
        step()  # what the fakes themselves keep
        before = sys.getallocatedblocks()
        for _ in range(200):
            step()
        grown = sys.getallocatedblocks() - before
    finally:
        gc.enable()
    assert torch.asked == asked and grown < 20
    assert pool.total_bytes() == sum(sizes) and torch.cuda.mem_get_info()[0] == limit - sum(sizes)


def test_what_cupy_gives_back_is_pytorchs(machine) -> None:
    limit = as_card.enter("rtx3060").memory_bytes
    cupy, torch = machine.cupy, machine.torch
    pool = cupy.get_default_memory_pool()
    kept = cupy.allocate(GIB)
    pool.free(cupy.allocate(8 * GIB))
    with pytest.raises(MemoryError):
        torch.reserve(6 * GIB)
    pool.free_all_blocks()
    torch.reserve(6 * GIB)
    pool.free(cupy.allocate(4 * GIB))
    other = cupy.allocate(3 * GIB)  # for which the free block of another size makes room
    assert pool.total_bytes() == 4 * GIB and torch.cuda.mem_get_info() == (limit - 10 * GIB, limit)
    for address in (kept, other):
        pool.free(address)
    pool.free_all_blocks()
    assert torch.cuda.mem_get_info() == (limit - 6 * GIB, limit)


def test_nothing_is_freed_once_the_interpreter_ends(machine, monkeypatch) -> None:
    as_card.enter("rtx3060")
    pool = machine.cupy.get_default_memory_pool()
    pool.free(machine.cupy.allocate(GIB))
    monkeypatch.setattr(machine.cupy.cuda.runtime, "free", lambda address: pytest.fail("CUDA may be gone"))
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    pool.free_all_blocks()


@pytest.mark.parametrize("name, said", [
    ("b200", "^card: expected one of compute capability 9.0 or older, which Fake GPU can play, got b200 of 10.0"),
    ("gtx1080", "^device: expected one of"),
    ("h200", "^card: expected one of at most 60.0 GiB, which Fake GPU has, got h200 of"),
])
def test_cards_that_cannot_be_played(machine, monkeypatch, name, said) -> None:
    if name == "h200":
        monkeypatch.setattr(this_gpu, "real_gpu", lambda: this_gpu.Gpu("Fake GPU", 90, 132, 60 * GIB))
    with pytest.raises(ValueError, match=said):
        as_card.enter(name)
    assert this_gpu.this_gpu().num_sms == 132


def test_without_a_card_it_is_the_gpu_at_hand(machine) -> None:
    assert str(this_gpu.this_gpu()) == "Fake GPU" and this_gpu.this_gpu() == this_gpu.real_gpu()


def test_a_script_and_a_module_are_run_as_typed(monkeypatch, tmp_path, capsys) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nimport neighbour\nprint(__name__, sys.argv[1:], neighbour.HERE)\n")
    (tmp_path / "neighbour.py").write_text("HERE = 1\n")
    entered, ran = [], []
    monkeypatch.setattr(as_card, "enter", entered.append)
    monkeypatch.setattr("gpu.measure.environment.missing", lambda: None)
    monkeypatch.setattr(as_card.memory, "peak_line", lambda: "peak 1")
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert as_card.main(["rtx3060", str(script), "--steps", "3"]) == 0
    assert entered == ["rtx3060"] and sys.argv == [str(script), "--steps", "3"]
    monkeypatch.setattr(runpy, "run_module", lambda name, **how: ran.append((name, how, list(sys.argv))))
    as_card.main(["l4", "-m", "gpu.tune", "-o", "t.json"])
    assert ran == [("gpu.tune", {"run_name": "__main__", "alter_sys": True}, ["gpu.tune", "-o", "t.json"])]
    assert capsys.readouterr().err.splitlines() == ["as rtx3060: peak 1", "as l4: peak 1"]
    script.write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        as_card.main(["rtx3060", str(script)])
    assert capsys.readouterr().err == "as rtx3060: peak 1\n"  # of what was reached, too


@pytest.mark.parametrize("words, said", [
    ([], "card"), (["rtx3060"], "expected a script"), (["rtx3060", "-m"], "expected a script")])
def test_what_is_left_out_is_named(words, said, capsys) -> None:
    with pytest.raises(SystemExit):
        as_card.main(words)
    assert said in capsys.readouterr().err
