"""What the README and the feature table show runs as shown, and is there."""
from __future__ import annotations

import re

import numpy as np
from paths import ROOT
from readme import README, example

from pkvsim import reference


def test_cpu_example(capsys) -> None:
    names: dict = {}
    exec(example("Without a GPU"), names)
    arguments = [names[name] for name in ("shape", "q", "k_pages", "v_pages", "block_table", "seq_lens")]
    expected, expected_lse = reference.attention(*arguments)
    np.testing.assert_allclose(names["out"], expected, atol=1e-12)
    np.testing.assert_allclose(names["lse"], expected_lse, atol=1e-12)
    assert "1 launch" in capsys.readouterr().out


def feature_rows() -> list[list[str]]:
    """The cells of the feature table's rows, its head first."""
    section = (ROOT / "docs/features.md").read_text().split("\n## Table\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_every_test_that_the_feature_table_names_exists() -> None:
    named = [found for _, ours, *_ in feature_rows() for found in re.findall(r"`([\w/]+\.py)::(\w+)`", ours)]
    assert len(named) > 20
    for path, name in named:
        source = (README.parent / "tests" / path).read_text()
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{path}::{name}"


def test_every_yes_of_ours_names_a_test_and_every_cell_is_filled() -> None:
    head, *rows = feature_rows()
    for row in rows:
        assert len(row) == len(head) and all(row), row
        assert row[1].startswith("no") or "yes" in row[1], row
        assert ("yes" in row[1]) == ("::" in row[1]), row


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < 150


def test_the_readme_names_what_other_systems_can_ask_of_it() -> None:
    text = README.read_text()
    assert all(f"({page})" in text for page in ("docs/vllm.md", "docs/drop_ins.md", "docs/serve.md", "docs/pool.md"))


def test_links_and_folders_exist() -> None:
    text = README.read_text()
    for path in [*re.findall(r"\]\(([^)h][^)]*)\)", text), *re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", text)]:
        assert (README.parent / path).exists(), path
