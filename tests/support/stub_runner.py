"""A model of no weights: every token follows from its request's tokens, as it finds them on the pages it is given."""
from __future__ import annotations

import numpy as np

from gpu.serve.step import StepInputs, StepTimes


def next_token(before: int, position: int, vocab_size: int) -> int:
    """The token at a position, behind `before`."""
    return (before * 31 + position * 17 + 7) % vocab_size


def expected_tokens(prompt: list[int], count: int, vocab_size: int) -> list[int]:
    """What the stub generates behind a prompt."""
    tokens, last = [], sum(prompt)
    for at in range(count):
        last = next_token(last, len(prompt) + at, vocab_size)
        tokens.append(last)
        last = sum(prompt) + sum(tokens)
    return tokens


class StubStep:
    """A step whose tokens are kept back until they are waited for, in order."""

    def __init__(self, runner: StubRunner, tokens: list[int], number: int) -> None:
        self.runner, self.tokens, self.number = runner, tokens, number

    def wait(self) -> np.ndarray:
        assert self.number == self.runner.waited, "steps are waited for in order"
        self.runner.waited += 1
        return np.array(self.tokens, np.int64)

    def times(self) -> StepTimes:
        return StepTimes(float(self.number), self.number + 0.5, len(self.tokens))


class StubRunner:
    """Keeps a token in each place of each page; what a row reads must be its own tokens, in their places."""

    def __init__(self, *, max_batch: int, num_pages: int, page_size: int, max_pages: int, vocab_size: int) -> None:
        self.page_size, self.vocab_size = page_size, vocab_size
        self.table = np.full((max_batch, max_pages), -1)
        self.store = np.full((num_pages, page_size), -1)
        self.last = np.full(max_batch, -1)
        self.launched = self.waited = 0
        self.steps_under_way = 0

    def now_us(self) -> float:
        return float(self.launched)

    def launch(self, inputs: StepInputs) -> StubStep:
        assert self.launched - self.waited <= 1, "at most one step is under way when another is launched"
        slots = [*inputs.decode_slots.tolist(), *(chunk.slot for chunk in inputs.chunks)]
        assert len(set(slots)) == len(slots)
        self.table[inputs.page_slots, inputs.page_columns] = inputs.page_ids
        for slot, length in zip(inputs.decode_slots.tolist(), inputs.decode_lens.tolist()):
            self._put(slot, length - 1, self.last[slot : slot + 1])
        for chunk in inputs.chunks:
            self._put(chunk.slot, chunk.begin, chunk.tokens)
            used = -(-(chunk.begin + len(chunk.tokens)) // self.page_size)
            assert self.table[chunk.slot, :used].tolist() == chunk.page_ids[:used]
        tokens = [self._give(slot, length) for slot, length in zip(
            inputs.decode_slots.tolist(), inputs.decode_lens.tolist())]
        tokens += [self._give(c.slot, c.begin + len(c.tokens)) for c in inputs.chunks if c.ends]
        self.launched += 1
        return StubStep(self, tokens, self.launched - 1)

    def _put(self, slot: int, begin: int, tokens: np.ndarray) -> None:
        at = begin + np.arange(len(tokens))
        self.store[self.table[slot, at // self.page_size], at % self.page_size] = tokens

    def _give(self, slot: int, length: int) -> int:
        at = np.arange(length)
        read = self.store[self.table[slot, at // self.page_size], at % self.page_size]
        assert (read >= 0).all()
        self.last[slot] = next_token(int(read.sum()), length, self.vocab_size)
        return int(self.last[slot])
