"""cuda_src/several.cu itself, built for the CPU, ranks and their CTAs as threads, against float64 attention."""
from __future__ import annotations

import ctypes
import time

import numpy as np
import nvrtc
import pytest
from decode_on_cpu import make_step
from several_on_cpu import Ranks, instance
from slow import slow_unless, slow_unless_of
from test_decode_kernel import assert_close, expected

from gpu.kernels.compile import SOURCE_DIR, compile_options
from gpu.kernels.variant import shared_limit_bytes
from gpu.several.inbox import EMPTY_WORD, HEAD_BYTES, rank_config
from pkvsim import AttentionOptions, DecodeShape
from pkvsim.schedule.shares import PageShares, in_proportion, in_runs, interleaved

LENS = (390, 0, 2, 33, 100, 16)
SHORT = (70, 0, 17)  # of kernels that take long on a CPU
# Ranks, CTAs of each, owner; group, head_dim, page size, dtype; shares; options.
CASES = {
    "two ranks by head": (2, 3, "head", 4, 64, 16, "float16", interleaved(2, 16), {}),
    "three by row, one without pages": (3, 2, "row", 1, 64, 3, "float16", PageShares(3, (7, 0, 2)), {"soft_cap": 4.0}),
    "four ranks, all own": (4, 1, "all", 2, 128, 16, "bfloat16", in_runs(4, 16, max_tokens=400), {"sinks": True}),
    "a group in two parts": (2, 1, "head", 18, 256, 16, "float16", in_proportion((7, 3), 16, cycle_pages=10),
                             {"kv_dtype": "int8", "kv_scales": "token"}),
}  # fmt: skip


def ranks_of(name: str, **more) -> Ranks:
    ranks, ctas, owner, group, head_dim, page_size, dtype, shares, options = CASES[name]
    shape, options = DecodeShape(2 * group, 2, head_dim, page_size), AttentionOptions(**options)
    config = rank_config(shape, dtype, 90, num_ranks=ranks, max_batch=8, variant=(2, 2), options=options)
    step = make_step(shape, dtype, options, seed=ranks, lens=SHORT if head_dim == 256 else LENS)
    return Ranks(step, config, shares, ctas=ctas, owner=owner, **more)


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "two ranks by head", CASES))
def test_ranks_merge_what_one_would_compute(name) -> None:
    """Three steps, so that each half of the inboxes is used again; then the way of collectives, to the same bits."""
    ranks, dtype, found = ranks_of(name), CASES[name][6], []
    for seed in range(3):
        ranks.launch(seed=seed)
        found.append(ranks.results())
        assert_close(found[-1], expected(ranks.step), dtype)
        assert ranks.left_empty() and all(rank.failure[0] == EMPTY_WORD for rank in ranks.ranks)
    exchanged = ranks_of(name, in_kernel=False)
    exchanged.launch()
    exchanged.merge_exchanged()
    found.append(exchanged.results())
    assert len({out.tobytes() + lse.tobytes() for out, lse in found}) == 1


def test_lengths_change_between_steps() -> None:
    """A step of fewer rows lays its slots elsewhere in the halves."""
    ranks = ranks_of("two ranks by head")
    shape, options = ranks.step.shape, ranks.step.options
    for seed, lens in enumerate(((5, 300), (0, 0), (17,), (40, 0, 1, 90, 200, 33, 1, 64), (128,))):
        ranks.set(make_step(shape, "float16", options, seed=seed, lens=lens))
        ranks.launch(seed=seed)
        assert_close(ranks.results(), expected(ranks.step), "float16")
    assert ranks.left_empty()


@pytest.mark.parametrize("before", [2**31 - 3, 2**32 - 3])
def test_steps_are_counted_beyond_32_bits(before) -> None:
    """A thousand layers a second come to 2^31 in a month."""
    ranks = ranks_of("two ranks by head", same_gpu=True, patience_ns=2_000_000_000)
    num, ctas = ranks.config.num_ranks, ranks.ctas
    for rank in ranks.ranks:
        rank.workspace.view(np.uint32)[-ctas * ranks.config.kernel.warps:] = before
        words = rank.inbox.view(np.uint32)
        words[:num], words[num + 1:2 * num + 1] = before, ((before + 1) * ctas - 1) % 2**32
    for step in range(1, 5):
        ranks.launch(seed=step)
        assert_close(ranks.results(), expected(ranks.step), "float16")
        assert all(rank.failure[0] == EMPTY_WORD for rank in ranks.ranks) and ranks.left_empty()
        assert all((rank.inbox.view(np.uint32)[:num][np.arange(num) != at] == (before + step) % 2**32).all()
                   for at, rank in enumerate(ranks.ranks))


@pytest.mark.slow
@pytest.mark.parametrize("owner", ["head", "row"])
def test_ranks_go_on_by_themselves(owner) -> None:
    """Steps without a barrier between the ranks, which are late at random: one may be a step ahead, and every step gives
    the same bits. By the row, rank 0 owns nothing of the one row, and only its peer's progress holds it back."""
    ranks = ranks_of("two ranks by head", same_gpu=True)
    ranks.owner = owner
    if owner == "row":
        ranks.set(make_step(ranks.step.shape, "float16", ranks.step.options, seed=1, lens=(100,)))
    ranks.launch()
    want = [rank.out.tobytes() + rank.lse.tobytes() for rank in ranks.ranks]
    found = ranks.launch_apart(12, seed=5, delay_s=0.02)
    assert found == [{one} for one in want] and ranks.left_empty()
    assert all(rank.failure[0] == EMPTY_WORD for rank in ranks.ranks)


def test_ranks_of_one_gpu_let_the_next_launch_begin_when_all_are_there() -> None:
    """A CTA is counted once a step with every rank; with a GPU for itself, a rank's launch says so at its beginning."""
    ranks = ranks_of("two ranks by head", same_gpu=True)
    ctas, num = ranks.ctas, ranks.config.num_ranks
    instances = [instance(ranks.config, at) for at in range(num * ctas)]
    told = [ctypes.c_int.in_dll(library, "next_kernel_started") for library in instances]
    for step in range(3):
        for count in told:
            count.value = 0
        ranks.launch(seed=step)
        assert_close(ranks.results(), expected(ranks.step), "float16")
        for rank in ranks.ranks:
            started = rank.inbox.view(np.uint32)[num + 1:2 * num + 1]
            assert (started + np.uint32(1) == (step + 1) * ctas).all()
        # One warp's lanes: once at first, and once for each state that it merges and had to wait for.
        merged = -(-len(ranks.step.lens) * ranks.step.shape.num_q_heads // ctas)
        assert all(count.value % 32 == 0 and count.value <= 32 * (1 + merged) for count in told)
    # Who is not there keeps the next launch of the others from beginning.
    ranks = ranks_of("two ranks by head", same_gpu=True, patience_ns=100_000_000)
    for count in told:
        count.value = 0
    ranks.launch(but=(1,))
    assert all(count.value == 0 for count in told)
    ranks = ranks_of("two ranks by head")
    ranks.launch()
    assert all(count.value >= 64 for count in told)  # every thread


@pytest.mark.parametrize(("name", "lost"), [
    ("two ranks by head", 1), pytest.param("three by row, one without pages", 0, marks=pytest.mark.slow)])
def test_a_rank_that_does_not_come_is_told_of_in_time(name, lost) -> None:
    ranks = ranks_of(name)
    ranks.launch()
    ranks.patience_ns = 200_000_000  # not before: a busy machine may keep threads waiting for longer
    begin = time.perf_counter()
    for _ in range(2):  # the second step ends at once
        ranks.launch(but=(lost,))
    assert 0.2 <= time.perf_counter() - begin < 5
    for number, rank in enumerate(ranks.ranks):
        assert rank.failure[0] == (EMPTY_WORD if number == lost else lost)
        assert rank.inbox.view(np.uint32)[ranks.config.num_ranks] == lost  # all are told, also the one that is late
    ranks.launch()  # it comes after all, and computes nothing that its host could take for results
    assert all(rank.failure[0] == lost and np.isnan(rank.lse).all() for rank in ranks.ranks)


def test_a_state_without_weight_leaves_the_slots_of_its_output_empty() -> None:
    """Where every logit is -inf nobody waits for the output: it would come after its slot was emptied."""
    ranks = ranks_of("two ranks by head", in_kernel=False)  # where nobody empties slots
    ranks.step.q[..., 0], ranks.step.k[..., 0] = 1, -np.inf
    ranks.launch()
    ranks.merge_exchanged()
    out, lse = ranks.results()
    assert (out == 0).all() and (lse == -np.inf).all()
    kernel, places = ranks.config.kernel, len(ranks.step.lens) * ranks.step.shape.num_kv_heads
    for rank in ranks.ranks:
        slots = rank.inbox[HEAD_BYTES:][:places * kernel.state_bytes].view(np.uint32).reshape(places, -1)
        assert (slots[:, :kernel.columns * kernel.v_dim] == EMPTY_WORD).all()
        assert (slots[:, kernel.columns * kernel.v_dim:] != EMPTY_WORD).all()


def test_a_rank_that_owns_nothing_is_held_back() -> None:
    """It receives nothing that it could wait for, but may not be two steps ahead of whom it sends to."""
    ranks = ranks_of("two ranks by head")
    ranks.owner = "row"
    ranks.set(make_step(ranks.step.shape, "float16", ranks.step.options, seed=1, lens=(100,)))
    ranks.launch()
    ranks.patience_ns = 1_000_000_000
    ranks.launch(but=(1,))  # rank 0 of two owns none of one row: its first step ahead passes
    assert ranks.ranks[0].failure[0] == EMPTY_WORD
    ranks.launch(but=(1,))
    assert ranks.ranks[0].failure[0] == 1


@pytest.mark.parametrize(("capability", "num_ranks", "group", "head_dim", "kv_dtype"), slow_unless_of(lambda *case: case[-1] == "float8_e4m3fn", [
    (86, 2, 4, 128, None), (90, 8, 16, 64, None), (90, 2, 4, 128, "float8_e4m3fn"), (86, 8, 1, 256, "int8"),
]))
def test_the_kernel_fits(capability, num_ranks, group, head_dim, kv_dtype) -> None:
    options = AttentionOptions(kv_dtype=kv_dtype, sinks=group == 4)
    config = rank_config(DecodeShape(group, 1, head_dim, 16), "float16", capability, num_ranks=num_ranks, max_batch=1,
                         options=options)
    assert config.shared_bytes <= shared_limit_bytes(capability)
    found = nvrtc.kernel_resources(SOURCE_DIR / "several.cu", capability, compile_options(config.defines()))
    assert set(found) == {"pkv_decode_several", "pkv_merge_ranks"}
    for used in found.values():
        assert used.spills == used.stack == used.static_shared == 0
        assert config.kernel.threads * -(-used.registers // 8) * 8 <= 65536
