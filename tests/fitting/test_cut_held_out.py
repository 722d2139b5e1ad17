"""What a serving run's JSON becomes, against the file that its kind of run gave before."""
import csv
import json
from itertools import groupby

import cut_held_out
import pytest

STEP = cut_held_out.STEP
KNOWN = cut_held_out.FOLDER / "1d357ebd.csv"


def run_of(lines: list[dict[str, str]]) -> dict:
    """A run's record with these steps and, for each, two before it that the file does not have."""
    first = lines[0]
    steps = [other for line in lines for other in (dict.fromkeys(line, "7"), dict.fromkeys(line, "8"), line)]
    engines = {route: {clock: [float(step[f"{route}_{clock}"] or 0) for step in steps] for clock in cut_held_out.CLOCKS}
               for route in cut_held_out.ROUTES if first[f"{route}_event_us"]}
    return {"family": first["family"], "seed": int(first["seed"]), "max_active": int(first["max_active"]),
            "shape": {"num_kv_heads": int(first["num_kv_heads"])}, "active": [1] * len(steps), "engines": engines}


@pytest.fixture
def document():
    with open(KNOWN, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    runs = [run_of(list(found)) for _, found in groupby(lines, lambda line: [line[name] for name in STEP[:4]])]
    return {"environment": {"source_hash": "0123456789abcdef"}, "options": {"stride": "8", "layers": "1"}, "runs": runs}


def test_the_known_file_comes_out_again(document, tmp_path, capsys) -> None:
    """But for the numbers of steps, of which the made-up run has three for each."""
    (tmp_path / "steps.json").write_text(json.dumps(document))
    assert cut_held_out.main([str(tmp_path / "steps.json"), "--every", "3", "--folder", str(tmp_path)]) == 0
    made, known = (tmp_path / "01234567.csv").read_text().splitlines(), KNOWN.read_text().splitlines()
    assert capsys.readouterr().out.strip() == str(tmp_path / "01234567.csv")
    assert made[0] == known[0] and len(made) == len(known)
    for one, other in zip(csv.DictReader(made), csv.DictReader(known)):
        assert int(one.pop("step")) % 24 == 16 and other.pop("step")
        assert one == other


def test_every_step_and_a_route_that_did_not_run(document, tmp_path) -> None:
    document["runs"] = document["runs"][:2]
    del document["runs"][1]["engines"]["xqa"]
    found = list(cut_held_out.rows(document, 1))
    steps = [8 * index for run in document["runs"] for index in range(len(run["active"]))]
    assert [row["step"] for row in found] == steps
    assert [row["xqa_wall_us"] == "" for row in found] == [row["seed"] == document["runs"][1]["seed"] for row in found]


@pytest.mark.parametrize("option, value", [("layers", "32"), ("--every", "0")])
def test_other_runs_are_refused(document, tmp_path, capsys, option, value) -> None:
    document["options"][option] = value
    (tmp_path / "steps.json").write_text(json.dumps(document))
    with pytest.raises(SystemExit):
        cut_held_out.main([str(tmp_path / "steps.json"), *([option, value] if option[0] == "-" else [])])
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "", "arrived,tokens\n1,2\n", "[]", '{"options": {}}'])
def test_files_that_no_run_wrote_are_refused_in_a_line(text, tmp_path, capsys) -> None:
    if text is not None:
        (tmp_path / "steps.json").write_text(text)
    with pytest.raises(SystemExit):
        cut_held_out.main([str(tmp_path / "steps.json")])
    assert "expected a JSON document of serving_trace" in capsys.readouterr().err
