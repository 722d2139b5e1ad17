"""tests.gpu.sanitize and its checks without a GPU: options, and that whatever kernels are compiled for is listed."""
from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from decode_on_cpu import make_step
from paths import ROOT

from gpu.cache.append_variant import CACHE_TYPES  # noqa: E402
from gpu.kernels.variant import HEAD_DIMS  # noqa: E402
from pkvsim.reference.rope import ROPE_STYLES  # noqa: E402
from pkvsim.selection.by_name import BY_SUMMARIES  # noqa: E402
from pkvsim.selection.summaries import SUMMARIES  # noqa: E402
from tests.gpu import sanitize, sanitize_checks


def test_the_list_covers_every_variant() -> None:
    names = list(sanitize_checks.checks())
    assert {f"append {kind} {style}" for kind in ("float16", *CACHE_TYPES) for style in ROPE_STYLES} <= set(names)
    assert {f"append {kind}" for kind in ("float16", *CACHE_TYPES)} <= set(names)
    assert set(sanitize_checks.APPEND_ROPES) == {None, *ROPE_STYLES}
    assert {form + ids for form in sanitize_checks.FORMS for ids in ("", ", int64")} <= set(names)
    assert set(sanitize_checks.SCHEDULES) | {"sinks", "soft cap", "window", "NHD", "page size 1"} <= set(names)
    assert {"selected", "page_lse", "evict pages", "evict heads"} <= set(names)
    assert {f"select by {method}" for method in (*BY_SUMMARIES, "given scores")} <= set(names)
    assert all(any(name.startswith(f"summaries {kind}") for name in names) for kind in SUMMARIES)
    listed = " ".join(names)
    assert all(str(dim) in listed for dim in HEAD_DIMS if dim != sanitize_checks.SHAPE.head_dim)


def test_every_check_is_called_as_it_can_be() -> None:
    for check in sanitize_checks.checks().values():
        inspect.signature(check.func).bind(*check.args, **check.keywords)


@pytest.mark.parametrize("case", [*sanitize_checks.SELECTED.values(), *sanitize_checks.PAGE_LSE.values()])
def test_rows_with_lists_have_their_query_tokens(case: dict) -> None:
    """Steps that float64 attention refuses prove nothing: a query token that sees no token gets NaN."""
    *arguments, lens = sanitize_checks.listed_case(**case)
    step = make_step(*arguments, seed=1, lens=lens)
    assert len(step.lens) == len(sanitize_checks.LENS) and 0 in step.lens
    assert step.lens[step.lens > 0].min() == step.options.query_tokens


def test_what_the_checks_import_is_found() -> None:
    named = set(re.findall(r"^    (?:from|import) (\w+)", Path(sanitize_checks.__file__).read_text(), re.MULTILINE))
    assert {"test_gpu_options", "selected_cases", "evicting_rows"} <= named
    assert all(importlib.util.find_spec(name) for name in named - {"torch", "cupy"})


def test_options(capsys: pytest.CaptureFixture) -> None:
    assert sanitize.main(["--list", "--only", "append"]) == 0
    appends = len(sanitize_checks.APPEND_TYPES) * len(sanitize_checks.APPEND_ROPES)
    assert len(capsys.readouterr().out.splitlines()) == appends
    assert list(sanitize.chosen(sanitize.parse_args(["NHD", "sinks"]))) == ["NHD", "sinks"]
    with pytest.raises(SystemExit):
        sanitize.parse_args(["nothing"])
    assert "CHECK: expected some of --list, got 'nothing'" in capsys.readouterr().err


def test_help_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.sanitize", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "compute-sanitizer" in done.stdout and "--list" in done.stdout
