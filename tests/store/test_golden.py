"""Digests that were once given. They never change once released: they name the rows of every store there is.

A test here that fails means that stores made before would silently be computed anew. Never correct golden_digests.json;
correct the code, or give a field that was added its entry in `recipe.DEFAULTS`. New entries may be added at the end.
"""

import base64
import datetime as dt
import hashlib
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from featurecache.store.binding import CELL_SCHEMA, Binding
from featurecache.store.recipe import Recipe, content_key

GOLDEN = json.loads(Path(__file__).with_name("golden_digests.json").read_text(encoding="utf-8"))
READ = {"Binary": bytes.fromhex, "Date": dt.date.fromisoformat, "Datetime": dt.datetime.fromisoformat}


def golden_binding(entry: dict[str, Any]) -> Binding:
    table = {
        name: pl.Series(
            [None if v is None else READ.get(kind, lambda x: x)(v) for v in values], dtype=getattr(pl, kind)
        )
        for name, kind, values in entry["columns"]
    }
    rows = [(*place, None if key is None else bytes.fromhex(key), state) for *place, key, state in entry["cells"]]
    cells = pl.DataFrame(rows, schema=dict(CELL_SCHEMA), orient="row")
    return Binding("golden", "/m.csv", "0" * 64, pl.DataFrame(table), {}, entry["recipes"], entry["multi"], cells)


@pytest.mark.parametrize("entry", GOLDEN["recipes"], ids=lambda entry: entry["what"])
def test_recipes(entry):
    """Never changes once released."""
    recipe = Recipe.from_json(entry["recipe"])
    assert (recipe.base, recipe.digest) == (entry["base"], entry["digest"])
    assert recipe.id == entry["digest"][:16]


@pytest.mark.parametrize("entry", GOLDEN["keys"], ids=lambda entry: f"{entry['kind']}-{entry['key'][:8]}")
def test_content_keys(entry):
    """Never changes once released."""
    payload = hashlib.sha256(base64.b64decode(entry["payload"])).digest()
    assert content_key(entry["kind"], entry["selector"], payload).hex() == entry["key"]


@pytest.mark.parametrize("entry", GOLDEN["bindings"])
def test_bindings(entry):
    """Never changes once released."""
    assert golden_binding(entry).digest == entry["digest"]


def test_there_are_ten_recipes_and_all_differ():
    assert len(GOLDEN["recipes"]) == 10
    assert len({entry["digest"] for entry in GOLDEN["recipes"]}) == 10
    assert len(GOLDEN["keys"]) == len({entry["key"] for entry in GOLDEN["keys"]}) == 5
    fields = {"schema", "reader", "preprocessing", "body", "engine", "precision", "storage_dtype", "taps"}
    tap = {"name", "tap", "module", "on", "call", "pool", "parameters", "weights", "program"}
    for entry in GOLDEN["recipes"]:
        assert set(entry["recipe"]) - {"augmentation"} == fields
        assert all(set(found) == tap for found in entry["recipe"]["taps"])
