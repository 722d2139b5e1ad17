"""examples/unified_pool.py: bounds that its figures must keep."""
import json

import unified_pool as script

from pkvsim.memory.tier_presets import SERIAL_FILES, UNIFIED_POOL
from pkvsim.models.presets import get_model


def test_times_are_between_their_bounds():
    model = get_model("gpt-oss-20b")
    context = 16384
    pool_s, loaded = script.pooled(model, context, UNIFIED_POOL)
    num_bytes = loaded.bytes_by_tier[-1].sum()
    assert num_bytes == (context - script.CHUNK_TOKENS) * 12 * 8 * 64 * 2 * 2  # its twelve full layers
    link_s, chunk = num_bytes / script.HOST_READ, script.chunk_s(model, context)
    assert link_s <= pool_s <= link_s * 1.02 + chunk + 2e-4
    files = SERIAL_FILES[1].read_bytes_per_s
    serial_s, loads = script.serial(model, context, script.serial_tiers(model, context, files))
    assert serial_s >= chunk + loads.bytes_by_tier[-1, 1] / files > pool_s


def test_the_page_names_what_it_assumes():
    page = script.page([])
    assert "arxiv.org/abs/2606.14779" in page and "Assumed" in page and "30.7" in page


def test_tables_are_json_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "tables", lambda: [script.implied(UNIFIED_POOL)])
    monkeypatch.setattr("sys.argv", ["unified_pool.py", "--json", str(tmp_path / "pool.json")])
    script.main()
    (found,) = json.loads((tmp_path / "pool.json").read_text())
    assert found["title"] in capsys.readouterr().out
    assert found["rows"] and all(len(row) == len(found["columns"]) for row in found["rows"])
