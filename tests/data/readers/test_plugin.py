"""Readers of users: one function, whose result is checked and whose code is part of the recipe."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
from image_files import refusal

from featurecache.data.readers import get_reader
from featurecache.errors import InputError, RecipeMismatchError


def test_a_function_is_a_reader():
    reader = get_reader("plugin_readers:raw", channels=3)
    decoded = reader.decode(bytes(range(4)), {"flip": True})
    assert decoded.limit == 255
    assert np.array_equal(decoded.array, np.repeat(np.array([[[1], [0]], [[3], [2]]], np.uint8), 3, axis=2))
    assert reader.name == "plugin_readers:raw"
    assert pickle.loads(pickle.dumps(reader)) == reader
    assert get_reader(reader.name, **reader.parameters()) == reader
    assert refusal(b"abc", reader) == "3 bytes are no square"


def test_results_are_checked():
    messages = {"nothing": "gave int64: accepted", "infinite": "gave NaN or infinite", "flat": "of shape (3,), not"}
    for name, message in messages.items():
        assert message in refusal(b"", get_reader(f"plugin_readers:{name}"))
    assert "gave 3 channels where 4" in refusal(b"", get_reader("plugin_readers:nothing", channels=4))


def test_other_code_is_another_recipe(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "own_reader.py"
    code = "import numpy\ndef fill(payload, selector):\n    return numpy.full((1, 1), {}, numpy.uint8)\n"
    file.write_text(code.format(1), encoding="utf-8")
    first = get_reader("own_reader:fill").parameters()
    file.write_text(code.format(2), encoding="utf-8")
    assert get_reader("own_reader:fill").parameters() != first
    with pytest.raises(RecipeMismatchError, match="its file has changed"):
        get_reader("own_reader:fill", **first)
    sys.modules.pop("own_reader")


def test_names_that_lead_nowhere():
    with pytest.raises(InputError, match=r"no function 'rwa'\. Did you mean 'raw'\?"):
        get_reader("plugin_readers:rwa")
    with pytest.raises(InputError, match="'plugin_raeders' can't be imported"):
        get_reader("plugin_raeders:raw")
    with pytest.raises(InputError, match="must be defined in a file"):
        get_reader("builtins:len")
