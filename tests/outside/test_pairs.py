"""Closed forms against counting entry by entry."""
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim.models.model_costs import _prefill_flops
from pkvsim.models.model_spec import CHUNKED, COMPRESSED, FULL, LATENT, SLIDING, STATE, AttentionSpec
from pkvsim.outside.pairs import KIND_CODES, chunk_pairs, entries_read, index_pairs
from pkvsim.outside.step_costs import UNBOUNDED

attentions = st.builds(
    lambda kind, window, selected, per_entry, index: AttentionSpec(
        kind=kind, num_q_heads=1, num_kv_heads=1, head_dim=1, value_dim=0, prefill_dims=(1, 0),
        window=0 if kind in (FULL, LATENT, STATE) else window,
        selected_entries=selected if kind in (FULL, LATENT, COMPRESSED) else 0,
        tokens_per_entry=per_entry if kind == COMPRESSED else 1, index_heads=index, index_dim=1,
    ),
    st.sampled_from([FULL, SLIDING, CHUNKED, LATENT, COMPRESSED, STATE]), st.integers(1, 40), st.integers(0, 30),
    st.integers(1, 9), st.integers(0, 1),
)


def numbers(a):
    return KIND_CODES[a.kind], a.window or UNBOUNDED, a.selected_entries, a.tokens_per_entry


@settings(deadline=None)
@given(attentions, st.integers(0, 150), st.integers(1, 90))
def test_pairs_of_a_chunk(a, begin, chunk):
    contexts = range(begin + 1, begin + chunk + 1)
    assert chunk_pairs(*numbers(a), begin, chunk) == sum(a.read_entries(context) for context in contexts)
    if a.index_heads:
        assert index_pairs(a.tokens_per_entry, begin, chunk) == sum(map(a.index_entries, contexts))


@settings(deadline=None)
@given(attentions, st.integers(0, 300))
def test_entries_of_a_decode_query(a, context):
    assert entries_read(*numbers(a), context) == a.read_entries(context)


@settings(deadline=None)
@given(st.sampled_from([FULL, SLIDING]), st.integers(1, 5000), st.integers(0, 100_000), st.integers(1, 9000))
def test_prefill_flops_are_the_models_own(kind, window, begin, chunk):
    a = AttentionSpec(
        kind=kind, num_q_heads=32, num_kv_heads=8, head_dim=128, value_dim=128, window=window if kind == SLIDING else 0
    )
    assert chunk_pairs(*numbers(a), begin, chunk) * 2 * 32 * 256 == _prefill_flops(a, begin, chunk)
