"""Drawn tokens: as frequent as the nucleus's probabilities in float64, and decided by their own row alone."""
from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpu.serve.sampling import draw, log_of_exponential, outside_nucleus, token_keys  # noqa: E402
from gpu.serve.step import DRAWN, FROM_NUCLEUS, LIKELIEST, SamplingParams  # noqa: E402


def drawn(logits, *, temperature=1.0, top_p=1.0, seed=0, position=0, cuts=True):
    """A token a row; what is one number serves all rows."""
    def each(value, dtype):
        return torch.as_tensor(value, dtype=dtype).expand(len(logits)).contiguous()

    return draw(logits, each(temperature, torch.float32), each(top_p, torch.float32), each(seed, torch.int64),
                each(position, torch.int64), token_keys(logits.shape[1], "cpu"), cuts=cuts)


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """What tokens are drawn with, float64 [vocab_size]."""
    likely = np.exp((logits - logits.max()) / temperature)
    likely /= likely.sum()
    order = np.argsort(-likely, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(likely[order]), top_p)) + 1]
    cut = np.zeros_like(likely)
    cut[kept] = likely[kept]
    return cut / cut.sum()


def check_frequencies(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's chi-square, whose distribution of k degrees has mean k and variance 2 k, is within 4 deviations."""
    assert not counts[probabilities == 0].any()
    expected = probabilities[probabilities > 0] * counts.sum()
    degrees = len(expected) - 1
    chi_square = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.9), (0.8, 0.5)])
@pytest.mark.parametrize("over", ["positions", "seeds"])
def test_tokens_are_as_frequent_as_the_nucleus_says(temperature, top_p, over):
    logits = np.random.default_rng(1).normal(0, 1.5, 30)
    probabilities, count = nucleus(logits, temperature, top_p), 60_000
    assert (probabilities > 0).sum() < 30 or top_p == 1
    numbers = torch.arange(count)
    where = {"position": numbers, "seed": 5} if over == "positions" else {"seed": numbers, "position": 77}
    rows = torch.from_numpy(logits).float().expand(count, 30)
    tokens = drawn(rows, temperature=temperature, top_p=top_p, cuts=top_p < 1, **where)
    check_frequencies(np.bincount(tokens, minlength=30), probabilities)


def test_neighbouring_draws_are_independent():
    """Pairs of tokens: of one request at a position and the next, of two requests at one position."""
    logits = torch.tensor([0.3, -0.2, 0.0, 0.5, 0.1]).expand(40_000, 5)
    likely = logits[0].double().softmax(-1).numpy()
    position = torch.arange(40_000)
    one = drawn(logits, position=position)
    for other in (drawn(logits, position=position + 1), drawn(logits, position=position, seed=1)):
        check_frequencies(np.bincount(one * 5 + other, minlength=25), np.outer(likely, likely).ravel())


def test_all_tokens_of_a_large_vocabulary_are_drawn_alike():
    """A flat distribution, which shows where hashes of token ids are not even."""
    tokens = torch.cat([drawn(torch.zeros(250, 16_000), position=torch.arange(250), seed=seed) for seed in range(4)])
    for kinds in (tokens % 16, tokens // 1000, tokens * 7919 % 16_000 // 1000):
        check_frequencies(np.bincount(kinds, minlength=16), np.full(16, 1 / 16))


def test_noise_is_gumbels():
    """Moments of log E: -0.5772 (Euler's constant), variance pi^2 / 6; and no token's ever is infinite."""
    noise = log_of_exponential(torch.arange(64), torch.arange(64) * 31, token_keys(20_000, "cpu")).double()
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(-0.57722, abs=0.006)
    assert noise.var() == pytest.approx(np.pi**2 / 6, rel=0.01)
    assert token_keys(100_000, "cpu").unique().numel() == 100_000


def test_nuclei_are_the_fewest_likeliest_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 40, generator=generator).mul(4).round().div(4)  # ties, of which the first is the likelier
    top_p = torch.rand(50, generator=generator).clamp_min(0.01)
    outside = outside_nucleus(logits, torch.ones(50), top_p)
    for row, (kept, p) in enumerate(zip(~outside, top_p.tolist())):
        assert (kept.numpy() == (nucleus(logits[row].double().numpy(), 1.0, p) > 0)).all()
    ones = torch.ones(50)
    assert not outside_nucleus(logits, ones, ones).any() and not outside_nucleus(logits, 0 * ones, top_p).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_temperature_0_takes_the_likeliest(dtype):
    logits = torch.randn(100, 500, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)
    for top_p, cuts in ((1.0, False), (0.3, True)):
        found = drawn(logits, temperature=0.0, top_p=top_p, position=torch.arange(100), cuts=cuts)
        assert (found == logits.argmax(-1)).all()
    found = drawn(logits, temperature=1e-4, position=torch.arange(100))
    assert (logits.gather(-1, found[:, None])[:, 0] == logits.amax(-1)).all()  # of several alike any may be drawn


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_errors_of_logits_seldom_change_a_token(top_p):
    """Of nearly flat distributions, as models of random weights give them; errors of 1e-3, as FP16 sums have."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 1000, generator=generator) * 0.3
    wrong = logits + (torch.rand(logits.shape, generator=generator) * 2 - 1) * 1e-3
    both = [drawn(given, temperature=0.8, top_p=top_p, position=torch.arange(2000)) for given in (logits, wrong)]
    # Two sums must be within 2e-3 / 0.8 of each other: less than once in 200 draws. A nucleus's edge moves as well.
    assert (both[0] != both[1]).double().mean() < 0.01


def test_rows_do_not_depend_on_each_other():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(24, 300, generator=generator).half()
    temperature = torch.tensor([0.0, 0.7, 1.0]).repeat(8)
    top_p, seed = torch.tensor([1.0, 1.0, 0.8, 0.4]).repeat(6), torch.arange(24) * 2**40
    position = torch.randint(0, 1 << 20, (24,), generator=generator)

    def of(rows):
        rows = torch.tensor(rows)
        return drawn(logits[rows], temperature=temperature[rows], top_p=top_p[rows], seed=seed[rows],
                     position=position[rows], cuts=bool((top_p[rows] < 1).any()))

    together = of(range(24))
    assert (together == torch.cat([of([row]) for row in range(24)])).all()
    order = torch.randperm(24, generator=generator)
    assert (of(order.tolist()) == together[order]).all()


def test_what_a_step_must_compute_is_the_most_that_a_row_asks_for():
    assert SamplingParams(top_p=0.5).choice == LIKELIEST
    assert SamplingParams(temperature=1.0).choice == DRAWN
    assert SamplingParams(temperature=1.0, top_p=0.5).choice == FROM_NUCLEUS
    assert LIKELIEST < DRAWN < FROM_NUCLEUS


def test_a_top_p_too_small_for_float32_leaves_the_likeliest_token():
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]]).repeat(50, 1)
    for top_p in (1e-30, 1e-50):
        assert (drawn(logits, top_p=top_p, seed=torch.arange(50)) == 2).all()
