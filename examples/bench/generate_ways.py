"""Ways to generate text from one batch, timed, and whether their tokens agree."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WAYS = ("sdpa", "pkv", "paged|sdpa", "paged|pkv_flash_2")  # the first is what the others are compared with


@dataclass(frozen=True, slots=True)
class Batch:
    """Left-padded prompts."""

    input_ids: torch.Tensor  # [rows, longest prompt] int64
    attention_mask: torch.Tensor  # alike, 0 where padded
    new_tokens: int

    def prompts(self) -> list[list[int]]:
        return [ids[mask.bool()].tolist() for ids, mask in zip(self.input_ids, self.attention_mask)]


@dataclass(frozen=True, slots=True)
class Result:
    """What one way generated, and how fast."""

    way: str
    tokens: torch.Tensor  # [rows, new_tokens] int64, on the host
    total_s: float  # a whole call
    prefill_s: float | None  # a call for one token

    def decode_tokens_per_s(self) -> float | None:
        """Of the tokens after the first; None where prefill was not timed."""
        rows, new_tokens = self.tokens.shape
        if self.prefill_s is None or new_tokens == 1:
            return None
        return rows * (new_tokens - 1) / (self.total_s - self.prefill_s)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a way's tokens compare with the reference's."""

    same_rows: int  # equal to the end
    near_ties: int  # rows that part where rounding decides
    wrong: tuple[tuple[int, int], ...]  # (row, token) where one parts elsewhere
    margins: tuple[float, ...] = ()  # of rows that part, in their order, as shares of the logits' standard deviation


def compare(
    found: torch.Tensor, expected: torch.Tensor, logits_of: Callable[[int], torch.Tensor], tolerance: float
) -> Agreement:
    """found, expected [rows, new_tokens]; logits_of(row) [new_tokens, vocabulary]: what `expected` was chosen by.

    tolerance: the margin of a near tie, as a share of the logits' standard deviation at that token.
    """
    same, wrong, margins = 0, [], []
    for row, (mine, theirs) in enumerate(zip(found.tolist(), expected.tolist(), strict=True)):
        at = next((i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), None)
        if at is None:
            same += 1
            continue
        logits = logits_of(row)[at].float()
        margins.append(float((logits[theirs[at]] - logits[mine[at]]) / logits.std()))
        if margins[-1] > tolerance:
            wrong.append((row, at))
    return Agreement(same, len(margins) - len(wrong), tuple(wrong), tuple(margins))


def reference_logits(model: PreTrainedModel, batch: Batch, tokens: torch.Tensor, row: int) -> torch.Tensor:
    """Logits [new_tokens, vocabulary] behind a row's tokens [rows, new_tokens], from one pass of SDPA over them all."""
    import torch

    model.set_attn_implementation(WAYS[0])
    prompt = batch.input_ids[row][batch.attention_mask[row].bool()]
    ids = torch.cat([prompt, tokens[row, :-1].to(prompt.device)])[None]
    with torch.no_grad():
        return model(ids, use_cache=False, logits_to_keep=tokens.shape[1]).logits[0]


def run_way(way: str, model: PreTrainedModel, batch: Batch, *, page_size: int) -> Result:
    """Times a call for one token and one for all, after a warm-up."""
    model.set_attn_implementation(way)
    own_pool = way.startswith("paged|")  # its call makes a pool first, which would count as prefill
    run = _paged_call(model, batch) if own_pool else _generate_call(way, model, batch, page_size)
    run(2)
    prefill_s = None if own_pool else _timed(run, 1, model.device)[1]
    tokens, total_s = _timed(run, batch.new_tokens, model.device)
    return Result(way, tokens, total_s, prefill_s)


def _generate_call(
    way: str, model: PreTrainedModel, batch: Batch, page_size: int
) -> Callable[[int], torch.Tensor]:
    from gpu.drop_ins.transformers_cache import PagedCache

    rows, width = batch.input_ids.shape
    cache, taken = None, {}
    if way == "pkv":
        cache = PagedCache(model.config, max_batch_size=rows, max_seq_len=width + batch.new_tokens, page_size=page_size)
        taken = cache.argument_of(model)

    def run(new_tokens: int) -> torch.Tensor:
        if cache is not None:
            cache.reset()
        found = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                               max_new_tokens=new_tokens, do_sample=False, **taken)
        return found[:, width:]

    return run


def _paged_call(model: PreTrainedModel, batch: Batch) -> Callable[[int], torch.Tensor]:
    """Transformers' continuous batching, on prompts without padding."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    prompts, pool = batch.prompts(), ContinuousBatchingConfig(max_memory_percent=0.5)

    def run(new_tokens: int) -> torch.Tensor:
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=pool)
        in_order = sorted(found.items(), key=lambda item: int(item[0].rsplit("_", 1)[1]))
        return torch.tensor([output.generated_tokens for _, output in in_order])

    return run


def _timed(run: Callable[[int], torch.Tensor], new_tokens: int, device: torch.device) -> tuple[torch.Tensor, float]:
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    tokens = run(new_tokens)
    wait()
    return tokens.cpu(), time.perf_counter() - start
