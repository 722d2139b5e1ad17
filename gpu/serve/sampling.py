"""Tokens drawn from logits, which nothing but a row's logits, its seed and its position decide.

A draw is a race, the Gumbel-max trick (Maddison, Tarlow and Minka, "A* Sampling", NeurIPS 2014, section 2): a token's
logit / temperature is raised by a number from Gumbel's distribution, hashed from seed, position and token id, and the
largest sum wins, token i with probability softmax(logits / temperature)[i]. Logits that are rounded otherwise swap two
tokens only where their sums nearly tie. A number that is looked up in the cumulative distribution would swap them
wherever an edge moves, and in a flat distribution every edge moves.
"""
from __future__ import annotations

import numpy as np
import torch

# |hash| + 1/2 times this is in (0, 1), and so are its nearest float32.
HASH_TO_UNIT = 2.0**-31 * (1 - 2.0**-22)


def token_keys(vocab_size: int, device: torch.device | str) -> torch.Tensor:
    """A number for each token id, int32 [vocab_size], no two alike: MurmurHash3's finaliser (Appleby, 2011)."""
    key = np.arange(vocab_size, dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        key ^= key >> np.uint32(shift)
        key *= np.uint32(factor)
    return torch.from_numpy((key ^ key >> np.uint32(16)).view(np.int32)).to(device)


def draw(logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, seed: torch.Tensor,
         position: torch.Tensor, keys: torch.Tensor, *, cuts: bool) -> torch.Tensor:
    """A token for each row of logits [n, vocab_size], int64 [n], as SamplingParams says.

    temperature, top_p [n] float32, seed, position [n] int64; keys: token_keys of the vocabulary. cuts: whether any row
    has a top_p below 1, without which nothing is sorted. Does not wait for the device.
    """
    raced = log_of_exponential(seed, position, keys).mul_(-temperature[:, None]).add_(logits)
    if cuts:
        raced.masked_fill_(outside_nucleus(logits, temperature, top_p), -torch.inf)
    return raced.argmax(-1)


def log_of_exponential(seed: torch.Tensor, position: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """log(E), E exponentially distributed, for each row and token, float32 [n, vocab_size]: -log(E) is Gumbel's.

    A row multiplies the tokens' keys by an odd number of its own, which with a sum or an exclusive or is a universal
    hash (Dietzfelbinger et al., Journal of Algorithms 25, 1997); what follows spreads its upper bits over the lower.
    """
    rows = row_keys(seed, position).view(torch.int32).view(-1, 2, 1)
    hashed = keys ^ rows[:, 0]
    hashed *= rows[:, 1] | 1
    hashed ^= (hashed >> 16).bitwise_and_(0xFFFF)  # int32 shifts keep the sign: its copies are cut off
    hashed *= -1028477387  # 0xc2b2ae35
    # Of float32's numbers those near 0 are the finest, where the winner of a race is.
    unit = hashed.float().abs_().add_(0.5).mul_(-HASH_TO_UNIT)
    return unit.log1p_().neg_().log_()


def row_keys(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """A number for each seed and position [n] int64: splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""

    def mixed(z: torch.Tensor, shift: int, factor: int) -> torch.Tensor:
        z = z ^ z >> shift & (1 << 64 - shift) - 1  # without the copies of the sign
        return z * factor if factor else z

    z = seed + (position + 1) * -7046029254386353131  # 0x9e3779b97f4a7c15
    z = mixed(z, 30, -4658895280553007687)  # 0xbf58476d1ce4e5b9
    z = mixed(z, 27, -7723592293110705685)  # 0x94d049bb133111eb
    return mixed(z, 31, 0)


def outside_nucleus(logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Which tokens a row does not draw, bool [n, vocab_size]: all but the fewest likeliest that have top_p together."""
    scaled = logits.float() / temperature.clamp_min(1e-6)[:, None]
    likely, ids = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    ahead = likely.cumsum(-1) - likely  # of all likelier tokens together
    cut = ((top_p < 1) & (temperature > 0))[:, None]
    # The likeliest token is inside, also where a top_p is too small for float32, in which it is 0.
    outside = (ahead >= top_p.clamp_min(torch.finfo(torch.float32).tiny)[:, None]) & cut
    return torch.empty_like(outside).scatter_(1, ids, outside)
