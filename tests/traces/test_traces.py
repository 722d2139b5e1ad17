"""The paper's traces bit for bit, its page assignment, and its request files."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim import DecodeShape, StepState
from pkvsim.traces import paper_families as traces
from pkvsim.traces.paper_families import FAMILIES, Draws, assign_pages, make_trace, paper_trace, pool_pages
from pkvsim.traces.paper_files import read_trace

# Pages reserved by the paper's traces of seed 20260623, page 16 (arXiv 2606.26666).
PAPER_PAGES = {("bimodal", 24): 24285, ("uniform", 24): 31446, ("zipf", 24): 30878, ("bucketed", 16): 30793}


def test_draws_are_mt19937():
    # The first outputs of the original mt19937ar generator for init_genrand(5489), its default seed.
    assert Draws(5489).outputs(3).tolist() == [3499211612, 581869302, 3890346734]
    assert Draws(5489).between(10, 13) == 10 + 3499211612 % 4
    assert Draws(5489 + 2**32).between(0, 2**32 - 1) == 3499211612  # seeds are taken modulo 2^32


@pytest.mark.parametrize(("family", "requests"), PAPER_PAGES)
def test_reserved_pages_are_the_papers(family, requests):
    trace = paper_trace(family, 20260623, requests, 8 if requests == 24 else 1, 48)
    assert trace.reserved_pages().sum() == pool_pages(trace, 0.0) == PAPER_PAGES[family, requests]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FAMILIES), st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([1, 16, 48]))
def test_family_ranges(family, seed, requests, page_size):
    trace = paper_trace(family, seed, requests, 4, 10, page_size=page_size)
    prompts, decodes = trace.prompt_tokens, trace.decode_tokens
    assert (prompts % page_size == 0).all()
    assert trace.arrival_steps.tolist() == [i // 4 for i in range(requests)]
    long = np.arange(requests) % 4 == 0
    ranges = {
        "uniform": [(slice(None), (4096, 32768), (16, 96))],
        "bimodal": [(long, (24576, 65536), (32, 128)), (~long, (2048, 12288), (8, 64))],
        "zipf": [(slice(None), (1024, 2048 + 65536 + 512), (8, 128))],
        "bucketed": [(slice(None), (8192, 65536), (32, 96))],
        "homogeneous": [(slice(None), (32768, 32768), (32, 96))],
    }
    for rows, (low, high), (decode_low, decode_high) in ranges[family]:
        assert ((prompts[rows] >= low) & (prompts[rows] < high + page_size)).all()
        assert ((decodes[rows] >= decode_low) & (decodes[rows] <= decode_high)).all()
    if family == "bucketed" and page_size == 16:
        assert prompts.tolist() == [(8192, 16384, 32768, 65536)[i % 4] for i in range(requests)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 40),
)  # fmt: skip
def test_steps_follow_the_rule(rows, max_active, steps):
    prompts, decodes, arrivals = (list(column) for column in zip(*rows))
    trace = make_trace("file", 0, prompts, decodes, arrivals, max_active=max_active, steps=steps, page_size=16)
    want = []
    for step in range(60):
        alive = [i for i, (_, d, a) in enumerate(rows) if 0 <= step - a < d][:max_active]
        if alive:
            want.append((step, alive, [-(-prompts[i] // 16) * 16 + step - arrivals[i] for i in alive]))
    got = [(s.step, s.request_ids.tolist(), s.seq_lens.tolist()) for s in trace.iter_steps()]
    assert got == want[:steps]


def test_first_bucketed_request_fills_the_papers_batch_of_one():
    """Seed 20260626: 57 of the paper's 64 B1 steps are its first request, 8,192 tokens and up."""
    trace = paper_trace("bucketed", 20260626, 16, 1, 64)
    ids = [int(s.request_ids[0]) for s in trace.iter_steps()]
    assert len(ids) == 64 and ids.count(0) == 57


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_pages_survive_holes_and_permutations(seed, requests, hole_fraction):
    trace = paper_trace("bimodal", seed, requests, 4, 10, page_size=256)
    pages = assign_pages(trace, hole_fraction=hole_fraction)
    reserved = trace.reserved_pages()
    assert pages.num_pages == pool_pages(trace, hole_fraction) >= reserved.sum() / (1 - hole_fraction)
    assert len(np.unique(pages.page_ids)) == len(pages.page_ids) == reserved.sum()
    assert 0 <= pages.page_ids.min() and pages.page_ids.max() < pages.num_pages
    shape = DecodeShape(8, 2, 64, 256)
    for step in trace.iter_steps():
        table = pages.block_table(step.request_ids)
        StepState(step.seq_lens, table).check_pages(shape, num_pages=pages.num_pages)
        for row, request in enumerate(step.request_ids):
            owned = pages.page_ids[pages.offsets[request] : pages.offsets[request + 1]]
            assert (table[row, : len(owned)] == owned).all()
            assert (table[row, len(owned) :] == traces.UNUSED_PAGE).all()


def test_lengths_stay_within_int32():
    with pytest.raises(ValueError, match="prompt_tokens: expected at most 2147483647 tokens with decode"):
        make_trace("file", 0, [2**31 - 16], [16], None, max_active=1, steps=1, page_size=16)


def test_shuffle_by_hand():
    trace = make_trace("file", 7, [5], [1], None, max_active=1, steps=1, page_size=1)
    order, outputs = list(range(6)), Draws(7 + 99).outputs(6).tolist()
    for i in range(6):
        j = i + outputs[i] % (6 - i)
        order[i], order[j] = order[j], order[i]
    assert assign_pages(trace).page_ids.tolist() == order


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "normal"}, "family: expected one of uniform, .* got 'normal'"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"requests": 0}, r"requests: expected an integer in \[1, 1000000\], got 0"),
        ({"max_active": 0}, "max_active: expected"),
        ({"steps": 0}, "steps: expected"),
        ({"page_size": 0}, "page_size: expected"),
    ],
)
def test_bad_trace_arguments(change, message):
    good = {"family": "uniform", "seed": 1, "requests": 4, "max_active": 2, "steps": 3}
    with pytest.raises(ValueError, match=message):
        paper_trace(**{**good, **change})


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_bad_hole_fraction(fraction):
    with pytest.raises(ValueError, match="hole_fraction: expected a number in"):
        assign_pages(paper_trace("uniform", 1, 2, 2, 2), hole_fraction=fraction)


GOOD_FILES = {
    "a.csv": "prompt_len,decode_len,arrival\n100,3,0\n\n32,2,5\n",
    "b.csv": "\ufeffother,decode,prompt,arrival_step\nx,3,100,0\ny,2,32,5\n",
    "c.json": '[{"prompt": 100, "decode": 3, "arrival": 0},\n {"prompt": 32, "decode_len": 2, "arrival_step": 5}]',
    "d.json": '{"requests": [{"prompt_len": 100, "decode": 3, "arrival": 0},'
    ' {"prompt": 32, "decode": 2, "arrival": 5}], "x": 1}',
    "e.jsonl": '{"prompt": 100, "decode": 3, "arrival": 0}\n{"prompt": 32, "decode": 2, "arrival": 5}\n',
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_request_files(tmp_path, name):
    path = tmp_path / name
    path.write_text(GOOD_FILES[name], encoding="utf-8")
    trace = read_trace(path, max_active=2, steps=9)
    assert trace.prompt_tokens.tolist() == [112, 32] and trace.decode_tokens.tolist() == [3, 2]
    assert trace.arrival_steps.tolist() == [0, 5] and trace.family == "file"
    assert [s.step for s in trace.iter_steps()] == [0, 1, 2, 5, 6]
    assert read_trace(path, requests=1, max_active=2, steps=9).num_requests == 1


def test_file_without_arrivals(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,decode\n1,1\n2,2\n3,3\n")
    assert read_trace(path, max_active=2, steps=9).arrival_steps.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt,decode\n1,1\n2,x\n", r"a\.csv:3: column decode: expected an integer .* got 'x'"),
        ("a.csv", "prompt,decode\n0,1\n", r"a\.csv:2: column prompt: expected an integer in \[1, .* got 0"),
        ("a.csv", "prompt,decode\n1.5,1\n", r"a\.csv:2: column prompt: .* got '1.5'"),
        ("a.csv", "prompt,decode\n1\n", r"a\.csv:2: expected 2 columns, got 1"),
        ("a.csv", "prompt,len\n1,2\n", r"a\.csv:1: column decode_len or decode: missing, found prompt, len"),
        ("a.csv", "prompt,decode\n", r"a\.csv: expected at least one request, got none"),
        ("a.csv", "", r"a\.csv: expected at least one request"),
        ("a.csv", "prompt,decode,arrival\n1,1,-1\n", r"a\.csv:2: column arrival: .* got -1"),
        ("a.json", '[{"prompt": 1, "decode": 1},\n{"prompt": 1}]', r"a\.json:2: column decode_len or decode: "),
        ("a.json", '[{"prompt": 1, "decode": true}]', r"a\.json:1: column decode: .* got True"),
        ("a.json", '[{"prompt": 1,\n "decode": }]', r"a\.json:2: column 12: Expecting value"),
        ("a.json", '[{"prompt": 1, "decode": 1}', r"a\.json:1: column 28: Expecting value"),
        ("a.json", "[3]", r"a\.json:1: expected an object per request, got 3"),
        (
            "a.json",
            '[{"prompt": 1, "decode": 1, "arrival": 0}, {"prompt": 1, "decode": 1}]',
            r"a\.json:1: column arrival: expected in every request or in none",
        ),
    ],
)
def test_bad_request_files(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(path, max_active=2, steps=9)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ValueError, match="none.csv: cannot read: No such file"):
        read_trace(tmp_path / "none.csv", max_active=2, steps=9)
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="b.csv: cannot read: "):
        read_trace(tmp_path / "b.csv", max_active=2, steps=9)
