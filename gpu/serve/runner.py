"""Steps on a device: what goes there, the model over it, the tokens that come back.

Tables, last tokens and sampling parameters stay on the device, by slot; a step sends what changed. Steps that decode
alone replay a CUDA graph of the next larger number of rows: tables, all layers, and the choice of tokens, which the
next step finds on the device. Steps with prompt chunks are issued layer by layer. Nothing here waits for the device but
LaunchedStep.wait().

A step's few KB of input and tokens are read and written by kernels, in pinned memory where it lies: a copy of the DMA
engines would wait in line behind the loads and stores of whole prompts that tiers have under way.
"""
from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gpu.serve.attention import Attention, StepRows
from gpu.serve.decoder import Decoder
from gpu.serve.sampling import draw, token_keys
from gpu.serve.step import FROM_NUCLEUS, LIKELIEST, SlotSampling, StepInputs, StepTimes
from pkvsim.outside.engine_profile import get_profile

STAGES = 4  # steps that may be under way before a buffer is used again
SLOTS, LENS, PAGE_SLOTS, PAGE_COLUMNS, PAGE_IDS = range(5)  # rows of a decode step's input


def graph_rows(max_batch: int) -> tuple[int, ...]:
    """Rows of the graphs that serve batches of up to max_batch: those that the simulator pads decode batches to."""
    return (*(rows for rows in get_profile("pkv").graph_sizes if rows < max_batch), max_batch)


@dataclass(slots=True, eq=False)
class _Stage:
    """Pinned buffers of one step under way; on the CPU plain ones."""

    inputs: torch.Tensor  # [room] int32
    inputs_there: torch.Tensor  # the same memory, as the device has it
    tokens: torch.Tensor  # [max_batch + 1] int64
    tokens_there: torch.Tensor
    start: Any = None  # events
    end: Any = None


class _OnHost:
    """Pinned memory, as libraries that share a GPU's arrays take it."""

    def __init__(self, host: torch.Tensor) -> None:
        self._kept = host
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape), "typestr": host.numpy().dtype.str, "data": (host.data_ptr(), False),
            "strides": None, "version": 2,
        }  # fmt: skip


class Launched:
    """A launched step."""

    __slots__ = ("_runner", "_stage", "_count", "_rows", "_times")

    def __init__(self, runner: Runner, stage: _Stage, count: int, rows: int) -> None:
        self._runner, self._stage, self._count, self._rows = runner, stage, count, rows
        self._times: StepTimes | None = None

    def wait(self) -> np.ndarray:
        start_us, end_us = self._runner.finish(self._stage)
        self._times = StepTimes(start_us, end_us, self._rows)
        return self._stage.tokens[: self._count].numpy().copy()

    def times(self) -> StepTimes:
        if self._times is None:
            raise RuntimeError("times: call wait() first")
        return self._times


class Runner:
    """Runs the steps of one model. Steps must be waited for in order, at most STAGES later."""

    __slots__ = ("model", "attention", "max_batch", "max_pages", "graph_rows", "_device", "_cuda", "_table",
                 "_row_tables", "_last_token", "_staged", "_chosen", "_token_keys", "_sampling", "_host_sampling",
                 "_stages", "_launched", "_stream", "_graphs", "_pool", "_origin", "_last_end", "_last_end_us")

    def __init__(self, model: Decoder, attention: Attention, *, max_batch: int, max_pages: int,
                 graphs: Sequence[int] = ()) -> None:
        """max_pages: of a row. graphs: rows that decode steps are captured for, ascending; none on the CPU."""
        self.model, self.attention, self.max_batch, self.max_pages = model, attention, max_batch, max_pages
        self._device, self._cuda = model.device, model.device.type == "cuda"
        self.graph_rows = tuple(graphs) if self._cuda else ()
        self._stream = torch.cuda.Stream(self._device) if self._cuda else None
        # The last slot is nobody's: what pads a step reads and writes there.
        slots, device = max_batch + 1, self._device
        self._table = torch.zeros((slots, max_pages), dtype=torch.int32, device=device)
        self._row_tables = torch.zeros((slots, max_pages), dtype=torch.int32, device=device)
        self._last_token = torch.zeros(slots, dtype=torch.int64, device=device)
        self._staged = torch.zeros((5, max_batch), dtype=torch.int32, device=device)
        self._chosen = torch.zeros(slots, dtype=torch.int64, device=device)
        self._token_keys = token_keys(model.config.vocab_size, device)
        self._host_sampling = np.zeros(slots), np.ones(slots), np.zeros(slots, np.int64)
        kinds = torch.float32, torch.float32, torch.int64
        self._sampling = [torch.from_numpy(a).to(device, kind) for a, kind in zip(self._host_sampling, kinds)]
        self._stages = [self._new_stage(5 * max_batch) for _ in range(STAGES)]
        self._launched, self._last_end, self._last_end_us = 0, None, 0.0
        self._graphs: dict[tuple[int, int], Any] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._cuda else None
        if self._cuda:
            torch.cuda.synchronize(device)
            with torch.cuda.stream(self._stream):
                self._last_end = torch.cuda.Event(enable_timing=True)
                self._last_end.record()
            torch.cuda.synchronize(device)
        self._origin = time.perf_counter()

    def now_us(self) -> float:
        return (time.perf_counter() - self._origin) * 1e6

    def capture(self) -> None:
        """Captures the graphs of greedy steps; those that draw are captured when one comes."""
        for rows in reversed(self.graph_rows):  # the largest first: the others fit into its memory
            self._graph(rows, LIKELIEST)

    def launch(self, inputs: StepInputs) -> Launched:
        """Begins a step."""
        self._update_sampling(inputs.sampling)
        stage = self._stages[self._launched % STAGES]
        self._launched += 1
        rows = next((rows for rows in self.graph_rows if rows >= len(inputs.decode_slots)), 0)
        with self.on_stream():
            if self._cuda:
                stage.start, stage.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if rows and not inputs.chunks:
                self._replay(inputs, rows, stage)
            else:
                rows = len(inputs.decode_slots)
                self._issue(inputs, stage)
            if inputs.num_outputs:
                torch.add(self._chosen[: inputs.num_outputs], 0, out=stage.tokens_there[: inputs.num_outputs])
            if self._cuda:
                stage.end.record()
        return Launched(self, stage, inputs.num_outputs, rows)

    def finish(self, stage: _Stage) -> tuple[float, float]:
        """Waits for a step; when it began and ended."""
        if not self._cuda:
            return stage.start, stage.end
        stage.end.synchronize()
        # From event to event, as single-precision milliseconds would grow coarse from a fixed origin.
        start_us = self._last_end_us + self._last_end.elapsed_time(stage.start) * 1e3
        end_us = start_us + stage.start.elapsed_time(stage.end) * 1e3
        self._last_end, self._last_end_us = stage.end, end_us
        return start_us, end_us

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Within it PyTorch's current stream is the steps'."""
        with torch.inference_mode():
            if self._stream is None:
                yield
                return
            with torch.cuda.stream(self._stream):
                yield

    def _new_stage(self, room: int) -> _Stage:
        return _Stage(*self._pinned(room, torch.int32), *self._pinned(self.max_batch + 1, torch.int64))

    def _pinned(self, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory of the host, and the same memory as the device has it. RuntimeError where that is a copy."""
        host = torch.zeros(count, dtype=dtype)
        if not self._cuda:
            return host, host
        with torch.cuda.device(self._device):
            host = host.pin_memory()
            there = torch.as_tensor(_OnHost(host), device="cuda")
        if there.data_ptr() != host.data_ptr():
            raise RuntimeError("pinned memory: expected the GPU to have it at its own address, got a copy")
        return host, there

    def _update_sampling(self, sampling: list[SlotSampling]) -> None:
        """Sends what changed; most requests sample as the slot's last one did."""
        temperatures, top_ps, seeds = self._host_sampling
        changed = False
        for s in sampling:
            if (temperatures[s.slot], top_ps[s.slot], seeds[s.slot]) != (s.temperature, s.top_p, s.seed):
                temperatures[s.slot], top_ps[s.slot], seeds[s.slot] = s.temperature, s.top_p, s.seed
                changed = True
        if changed:
            with self.on_stream():
                for device, host in zip(self._sampling, self._host_sampling):
                    values = torch.from_numpy(host.copy()).to(device.dtype)
                    device.copy_(values.pin_memory() if self._cuda else values, non_blocking=True)

    def _replay(self, inputs: StepInputs, rows: int, stage: _Stage) -> None:
        """A decode step by its graph."""
        graph = self._graph(rows, inputs.choice)
        given, updates = len(inputs.decode_slots), len(inputs.page_slots)
        host = stage.inputs.numpy()[: 5 * self.max_batch].reshape(5, self.max_batch)
        host[SLOTS, given:rows], host[LENS, given:rows] = self.max_batch, 0
        host[SLOTS, :given], host[LENS, :given] = inputs.decode_slots, inputs.decode_lens
        host[PAGE_SLOTS, updates:rows], host[PAGE_COLUMNS:, updates:rows] = self.max_batch, 0
        host[PAGE_SLOTS, :updates], host[PAGE_COLUMNS, :updates] = inputs.page_slots, inputs.page_columns
        host[PAGE_IDS, :updates] = inputs.page_ids
        torch.add(stage.inputs_there[: 5 * self.max_batch].view(5, self.max_batch), 0, out=self._staged)
        stage.start.record()
        graph.replay()

    def _graph(self, rows: int, choice: int) -> Any:
        """The graph of a decode step of so many rows; made where there is none yet."""
        if (rows, choice) not in self._graphs:
            with self.on_stream():
                staged = self._staged[:, :rows]
                staged[SLOTS] = staged[PAGE_SLOTS] = self.max_batch
                staged[LENS] = staged[PAGE_COLUMNS] = staged[PAGE_IDS] = 0
                self._decode(rows, choice)  # compiles and allocates what a capture must not
                self._stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                # Relaxed: another library's first use of something must not end the capture.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="relaxed"):
                    self._decode(rows, choice)
            self._graphs[rows, choice] = graph
        return self._graphs[rows, choice]

    def _decode(self, rows: int, choice: int) -> None:
        """A decode step of the first `rows` columns of the staged input."""
        slots, lens, page_slots, page_columns, page_ids = self._staged[:, :rows]
        self._table.index_put_((page_slots, page_columns), page_ids)
        table = self._row_tables[:rows]
        torch.index_select(self._table, 0, slots, out=table)
        self.attention.begin(StepRows(lens, table, None, rows, []))
        x = self.model.hidden(self._last_token.index_select(0, slots), self.attention)
        self._choose(x, slots, lens, choice)

    def _issue(self, inputs: StepInputs, stage: _Stage) -> None:
        """A step with prompt chunks, or on the CPU."""
        decode, chunks = len(inputs.decode_slots), inputs.chunks
        ends = decode + np.cumsum([len(chunk.tokens) for chunk in chunks], dtype=np.int64)
        done = np.array([chunk.ends for chunk in chunks], bool)
        chunk_rows = np.array([(chunk.slot, chunk.begin + len(chunk.tokens)) for chunk in chunks], np.int32)
        slots, lens = np.concatenate([(inputs.decode_slots, inputs.decode_lens), chunk_rows.reshape(-1, 2).T], axis=1)
        outputs = np.concatenate([np.ones(decode, bool), done])
        parts = self._send(
            [inputs.page_slots, inputs.page_columns, inputs.page_ids, slots, lens,
             np.concatenate([np.arange(decode + 1), ends]), *[chunk.tokens for chunk in chunks],
             np.concatenate([np.arange(decode), ends[done] - 1]), slots[outputs], lens[outputs]], stage,
        )  # fmt: skip
        page_slots, page_columns, page_ids, row_slots, row_lens, offsets, *tokens = parts
        tokens, (picked, output_slots, output_lens) = tokens[: len(chunks)], tokens[len(chunks) :]
        if self._cuda:
            stage.start.record()
        else:
            stage.start = self.now_us()
        self._table.index_put_((page_slots, page_columns), page_ids)
        self.attention.begin(StepRows(row_lens, self._table.index_select(0, row_slots), offsets, decode, chunks))
        known = self._last_token.index_select(0, row_slots[:decode])
        x = self.model.hidden(torch.cat([known, *(part.long() for part in tokens)]), self.attention)
        if inputs.num_outputs:
            self._choose(x.index_select(0, picked), output_slots, output_lens, inputs.choice)
        if not self._cuda:
            stage.end = self.now_us()

    def _send(self, arrays: list[np.ndarray], stage: _Stage) -> list[torch.Tensor]:
        """The arrays on the device as int32, in one piece."""
        lengths = [len(array) for array in arrays]
        total = sum(lengths)
        if total > len(stage.inputs):  # its last step has been waited for, so that nothing reads the shorter one
            stage.inputs, stage.inputs_there = self._pinned(2 * total, torch.int32)
        np.concatenate(arrays, out=stage.inputs.numpy()[:total], casting="unsafe")
        sent = torch.add(stage.inputs_there[:total], 0)
        return list(sent.split(lengths))

    def _choose(self, x: torch.Tensor, slots: torch.Tensor, lens: torch.Tensor, choice: int) -> None:
        """The next token of hidden states x [n, h] of slots [n]: kept as their last one, and put out."""
        logits, slots = self.model.logits(x), slots.long()
        if choice != LIKELIEST:
            temperature, top_p, seed = (kept.index_select(0, slots) for kept in self._sampling)
            chosen = draw(logits, temperature, top_p, seed, lens.long(), self._token_keys,
                          cuts=choice == FROM_NUCLEUS)
        else:
            chosen = self.model.products.argmax(logits)
        self._last_token.index_copy_(0, slots, chosen)
        self._chosen[: len(chosen)].copy_(chosen)
