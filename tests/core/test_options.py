"""Windows, soft caps, sinks and several query tokens: each against plain attention on rearranged inputs."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim import AttentionOptions, DecodeShape, make_schedule, reference
from pkvsim.kv_types import KV_DTYPES
from pkvsim.reference.append import FP8_DTYPES, dequantize
from pkvsim.schedule.costs import BalancedCosts

SHAPE = DecodeShape(num_q_heads=4, num_kv_heads=2, head_dim=8, page_size=4)
lengths = st.lists(st.integers(0, 70), min_size=1, max_size=4)


def make_step(lens, *, query_tokens=1, v_head_dim=8, seed=0):
    rng = np.random.default_rng(seed)
    lens = np.array(lens, np.int32)
    pages = -(-lens // SHAPE.page_size)
    table = np.full((len(lens), max(1, int(pages.max()))), 2**31 - 1, np.int32)
    ids = rng.permutation(int(pages.sum()) + 2)
    for row, count in enumerate(pages):
        table[row, :count], ids = ids[:count], ids[count:]
    count = int(pages.sum()) + 2
    k = rng.normal(size=(count, 2, 4, 8))
    v = rng.normal(size=(count, 2, 4, v_head_dim))
    tokens = () if query_tokens == 1 else (query_tokens,)
    return rng.normal(size=(len(lens), *tokens, 4, 8)), k, v, table, lens


def close(a, b):
    for x, y in zip(a, b):
        np.testing.assert_allclose(x, y, atol=1e-12)


@given(lens=lengths, window=st.integers(1, 90))
def test_a_window_reads_the_last_tokens_only(lens, window):
    q, k, v, table, lens = make_step(lens)
    out, lse = reference.attention(SHAPE, q, k, v, table, lens, options=AttentionOptions(window=window))
    for row, length in enumerate(lens):  # the same row with the tokens before the window cut off, page by page
        tokens = [(table[row, t // 4], t % 4) for t in range(max(0, length - window), length)]
        cut = np.arange(len(tokens))
        pages = -(-len(tokens) // 4)
        k_row, v_row = np.zeros((max(1, pages), 2, 4, 8)), np.zeros((max(1, pages), 2, 4, 8))
        for at, (page, slot) in zip(cut, tokens):
            k_row[at // 4, :, at % 4], v_row[at // 4, :, at % 4] = k[page, :, slot], v[page, :, slot]
        want = reference.attention(SHAPE, q[row:row + 1], k_row, v_row, np.arange(max(1, pages), dtype=np.int32)[None],
                                   np.array([len(tokens)], np.int32))
        close((out[row:row + 1], lse[row:row + 1]), want)


@given(lens=lengths, query_tokens=st.integers(2, 8), window=st.one_of(st.none(), st.integers(1, 40)), data=st.data())
def test_query_tokens_are_steps_one_after_the_other(lens, query_tokens, window, data):
    lens = [n + query_tokens if n else 0 for n in lens]
    counts = np.array([data.draw(st.integers(1, query_tokens)) for _ in lens])
    q, k, v, table, lens = make_step(lens, query_tokens=query_tokens)
    out, lse = reference.attention(SHAPE, q, k, v, table, lens, query_lens=counts,
                                   options=AttentionOptions(query_tokens=query_tokens, window=window))
    for token in range(query_tokens):
        live = token < counts
        earlier = np.where(lens > 0, lens - (counts - 1 - token), 0).clip(0).astype(np.int32)
        want = reference.attention(
            SHAPE, q[:, token], k, v, table, np.minimum(earlier, lens), options=AttentionOptions(window=window)
        )
        close((out[live, token], lse[live, token]), (want[0][live], want[1][live]))
        assert (out[~live, token] == 0).all()


@given(lens=lengths)
def test_a_sink_is_a_token_whose_value_is_zero(lens):
    q, k, v, table, lens = make_step(lens)
    sinks = np.random.default_rng(1).normal(size=4)
    out, lse = reference.attention(SHAPE, q, k, v, table, lens, options=AttentionOptions(sinks=True), sinks=sinks)
    plain, plain_lse = reference.attention(SHAPE, q, k, v, table, lens)
    live = lens > 0
    total = np.exp(plain_lse) + np.exp(sinks)
    close((out[live], lse[live]), ((plain * (np.exp(plain_lse) / total)[..., None])[live], np.log(total)[live]))
    assert (out[~live] == 0).all()


@given(lens=lengths)
def test_a_high_soft_cap_changes_nothing_and_a_low_one_evens_out(lens):
    q, k, v, table, lens = make_step(lens)
    plain = reference.attention(SHAPE, q, k, v, table, lens)
    high = reference.attention(SHAPE, q, k, v, table, lens, options=AttentionOptions(soft_cap=1e6))
    np.testing.assert_allclose(high[0], plain[0], atol=1e-9)
    low = reference.attention(SHAPE, q, k, v, table, lens, options=AttentionOptions(soft_cap=1e-9))
    live = lens > 0
    counts = np.broadcast_to(np.log(lens[live])[:, None], low[1][live].shape)
    np.testing.assert_allclose(low[1][live], counts, atol=1e-6)


@settings(deadline=None)
@given(
    lens=lengths, name=st.sampled_from(["balanced", "workqueue", "split"]),
    window=st.one_of(st.none(), st.integers(1, 80)), soft_cap=st.sampled_from([None, 2.0]), sinks=st.booleans(),
    query_tokens=st.integers(1, 3), v_head_dim=st.sampled_from([8, 4]),
)  # fmt: skip
def test_every_schedule_gives_the_same(lens, name, window, soft_cap, sinks, query_tokens, v_head_dim):
    options = AttentionOptions(window, soft_cap, sinks, query_tokens, v_head_dim)
    step = make_step([n + query_tokens if n else 0 for n in lens], query_tokens=query_tokens, v_head_dim=v_head_dim)
    logits = np.linspace(-1, 1, 4) if sinks else None
    how = {"num_ctas": 5, "costs": BalancedCosts(segment=1)} if name == "balanced" else {"splits": 3}
    schedule = make_schedule(name, SHAPE, step[4], tile_tokens=8, window=options.reach, **how)
    close(reference.run_schedule(schedule, SHAPE, *step, options=options, sinks=logits),
          reference.attention(SHAPE, *step, options=options, sinks=logits))


@given(
    lens=st.lists(st.integers(0, 5000), min_size=1, max_size=6), window=st.integers(1, 6000),
    num_ctas=st.integers(1, 40),
)  # fmt: skip
def test_tiles_before_the_window_are_not_scheduled(lens, window, num_ctas):
    how = {"tile_tokens": 16, "num_ctas": num_ctas, "costs": BalancedCosts(segment=2), "window": window}
    tasks = make_schedule("balanced", SHAPE, lens, **how).tasks
    for row, length in enumerate(lens):
        for head in range(SHAPE.num_kv_heads):
            mine = tasks[(tasks["row"] == row) & (tasks["kv_head"] == head)]
            covered = np.concatenate([np.zeros(0), *(np.arange(t["tile_begin"], t["tile_end"]) for t in mine)])
            np.testing.assert_array_equal(covered, np.arange(max(0, length - window) // 16, -(-length // 16)))


@pytest.mark.parametrize("bad", [
    {"window": 0}, {"window": True}, {"soft_cap": 0.0}, {"soft_cap": float("inf")}, {"query_tokens": 9},
    {"soft_cap": "50"}, {"soft_cap": True}, {"soft_cap": 10**400}, {"sinks": np.zeros(8)}, {"sinks": "no"},
    {"query_tokens": 0}, {"v_head_dim": 0}, {"kv_dtype": "float8"}, {"kv_dtype": "float16"}, {"kv_scales": "token"},
    {"kv_scales": "head", "kv_dtype": "int8"},
])  # fmt: skip
def test_bad_options_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AttentionOptions(**bad)


@pytest.mark.parametrize("query_tokens", [1, 2, 8])
def test_the_longest_window_reaches_the_whole_row(query_tokens):
    """Kernels count its reach in 31 bits."""
    options = AttentionOptions(window=2**31 - 1, query_tokens=query_tokens)
    assert options.reach == 2**31 - 1
    close(reference.attention(SHAPE, *make_step([40], query_tokens=query_tokens), options=options),
          reference.attention(SHAPE, *make_step([40], query_tokens=query_tokens),
                              options=AttentionOptions(query_tokens=query_tokens)))


def test_a_cache_has_the_scales_that_a_writer_gives_it():
    found = [AttentionOptions(kv_dtype=name).kv_scales for name in (None, *KV_DTYPES)]
    assert found == [None, "tensor", "tensor", "token"]
    options = AttentionOptions(window=5).with_cache("int8", "page")
    assert options == AttentionOptions(window=5, kv_dtype="int8", kv_scales="page")
    assert options.with_cache(None) is options and options.with_cache("int8") == options
    for other, name in ((("float8_e5m2",), "kv_dtype"), (("int8", "token"), "kv_scales")):
        with pytest.raises(ValueError, match=f"^{name}: expected that of the options"):
            options.with_cache(*other)


@pytest.mark.parametrize("name", KV_DTYPES)
@given(data=st.data())
def test_what_is_dequantised_is_what_was_stored(name, data):
    """Within half a step of the type, with any kind of scales."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    pages = rng.normal(size=(3, 2, 4, 16))
    size = data.draw(st.sampled_from([(1,), (3, 2), (3, 2, 4)]))
    scales = np.exp2(rng.uniform(-9, -4, size)).astype(np.float32)
    steps = pages / dequantize(np.full(pages.shape, 1).astype(FP8_DTYPES.get(name, np.int8)), name, scales)
    rounded = np.clip(np.rint(steps), -127, 127) if name == "int8" else np.clip(steps, -400, 400)
    stored = rounded.astype(FP8_DTYPES.get(name, np.int8))
    got, by_bytes = dequantize(stored, name, scales), dequantize(stored.view(np.uint8), name, scales)
    np.testing.assert_array_equal(got, by_bytes)
    kept = np.abs(steps) < (127 if name == "int8" else 400)
    unit = np.abs(got / np.where(stored.astype(float) == 0, np.inf, stored.astype(float)))
    relative = {"float8_e4m3fn": 2**-4, "float8_e5m2": 2**-3, "int8": 0}[name]
    bound = np.abs(pages) * relative + (0.5 if name == "int8" else 2**-9) * np.broadcast_to(unit.max(), pages.shape)
    assert (np.abs(got - pages)[kept] <= bound[kept]).all()


@pytest.mark.parametrize("bad,named", [(("int4", 1.0), "kv_dtype"), (("int8", np.ones(2)), "scales"),
                                       (("float8_e5m2", 1.0), "pages")])
def test_what_cannot_be_dequantised_is_named(bad, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        dequantize(np.zeros((1, 2, 3, 4), np.int8), *bad)
