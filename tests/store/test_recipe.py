import hashlib
import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurecache.errors import InputError
from featurecache.store import recipe as module
from featurecache.store.recipe import Recipe, canonical_json, content_key, shortened

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
FLOAT = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | FLOAT | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
TAP = {"name": "penultimate@none", "module": "classifier", "on": "input", "call": 0, "pool": "none", "parameters": {}}


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        # RFC 8785, appendix B
        ("0000000000000000", "0"), ("8000000000000000", "0"), ("0000000000000001", "5e-324"),
        ("8000000000000001", "-5e-324"), ("7fefffffffffffff", "1.7976931348623157e+308"),
        ("4340000000000000", "9007199254740992"), ("c340000000000000", "-9007199254740992"),
        ("4430000000000000", "295147905179352830000"), ("44b52d02c7e14af5", "9.999999999999997e+22"),
        ("44b52d02c7e14af6", "1e+23"), ("44b52d02c7e14af7", "1.0000000000000001e+23"),
        ("444b1ae4d6e2ef4e", "999999999999999700000"), ("444b1ae4d6e2ef4f", "999999999999999900000"),
        ("444b1ae4d6e2ef50", "1e+21"), ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"),
        ("3eb0c6f7a0b5ed8d", "0.000001"), ("41b3de4355555553", "333333333.3333332"),
        ("41b3de4355555557", "333333333.33333343"), ("becbf647612f3696", "-0.0000033333333333333333"),
        ("43143ff3c1cb0959", "1424953923781206.2"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_rfc_8785_shows(bits, text):
    assert canonical_json(struct.unpack(">d", bytes.fromhex(bits))[0]) == text.encode()


def test_example_of_rfc_8785():
    value = {
        "numbers": [333333333.33333329, 1e30, 4.50, 2e-3, 0.000000000000000000000000001],
        "string": "€$\u000f\u000aA'\u0042\u0022\u005c\\\"/",
        "literals": [None, True, False],
    }
    expected = (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )
    assert canonical_json(value) == expected.encode()


def test_keys_are_sorted_by_utf16_units():
    keys = ["€", "\r", "\ufb33", "1", "😀", "\u0080", "ö"]
    assert list(json.loads(canonical_json(dict.fromkeys(keys)))) == ["\r", "1", "\u0080", "ö", "€", "😀", "\ufb33"]


@given(JSON)
def test_canonical_json_round_trips_and_is_a_fixed_point(value):
    text = canonical_json(value)
    assert json.loads(text) == value or canonical_json(json.loads(text)) == text
    assert canonical_json(json.loads(text)) == text


@given(st.dictionaries(TEXT, JSON), st.randoms())
def test_order_of_insertion_does_not_count(value, random):
    items = list(value.items())
    random.shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(value)


@given(FLOAT)
def test_numbers_keep_their_value(value):
    assert float(canonical_json(value)) == value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "value is nan, which JSON doesn't have"),
        ({"mean": [0.5, math.inf]}, r"mean\[1\] is inf, which JSON doesn't have"),
        (2**53 + 1, "value = 9007199254740993 is no exact number; write it as a string"),
        ({1: 2}, "has the key 1, which is not a string"),
        ({"a": b"x"}, "a is a bytes, which JSON doesn't have"),
        ({"a": {"b": object()}}, "a.b is a object"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_what_json_does_not_have_is_refused(value, message):
    with pytest.raises(InputError, match=message):
        canonical_json(value)


def test_numpy_numbers_are_numbers():
    assert canonical_json([np.float64(0.5), np.int64(3), np.float32(0.25)]) == b"[0.5,3,0.25]"


def test_content_key_is_the_documented_hash():
    payload = hashlib.sha256(b"pixels").digest()
    key = content_key("file", {"frame": 2}, payload)
    assert key == hashlib.sha256(b'key/1\nfile\n{"frame":2}\n' + payload).digest()
    assert key == content_key("file", '{"frame":2}', payload)
    assert len({key, content_key("file", {}, payload), content_key("bytes", {"frame": 2}, payload)}) == 3
    with pytest.raises(InputError, match="a SHA-256 has 32 bytes, found 3"):
        content_key("file", {}, b"abc")


def test_a_field_of_a_later_version_is_left_out_at_its_default(monkeypatch):
    before = Recipe({"reader": {"name": "image"}}, (TAP,))
    digests = before.base, before.digest
    later = Recipe({"reader": {"name": "image", "gamma": 1.0}, "border": "zeros"}, ({**TAP, "normalised": False},))
    assert (later.base, later.digest) != digests
    table = {"border": "zeros", "reader.gamma": 1, "taps.normalised": False}
    monkeypatch.setattr(module, "DEFAULTS", table)
    later = Recipe(later.fields, later.taps)
    assert (later.base, later.digest) == digests
    assert later.holds(before)
    assert before.holds(later)
    assert later.differences(before) == []
    assert later.to_json()["border"] == "zeros"
    other = Recipe({"reader": {"name": "image", "gamma": 2.2}, "border": "zeros"}, (TAP,))
    assert other.base != digests[0]
    assert other.differences(before) == [("reader.gamma", 2.2, None)]


def test_no_default_is_given_yet():
    assert dict(module.DEFAULTS) == {}


def test_taps_count_as_a_set_and_are_not_in_the_base():
    other = {**TAP, "name": "layer4@avg", "module": "layer4", "on": "output", "pool": "avg"}
    both, swapped, one = Recipe({}, (TAP, other)), Recipe({}, (other, TAP)), Recipe({}, (TAP,))
    assert both == swapped
    assert hash(both) == hash(swapped)
    assert both.base == one.base
    assert both.digest != one.digest
    assert both.holds(one)
    assert not one.holds(both)
    assert both.tap_names == ("layer4@avg", "penultimate@none")


def test_a_tap_of_the_same_name_and_other_parameters_is_another_tap():
    assert not Recipe({}, ({**TAP, "pool": "gem", "parameters": {"p": 3}},)).holds(
        Recipe({}, ({**TAP, "pool": "gem", "parameters": {"p": 4}},))
    )


def test_differences_name_the_field_and_both_values():
    a = Recipe({"preprocessing": {"resize": 256, "mean": [0.5, 0.5]}, "precision": "fp32"}, (TAP,))
    b = Recipe(
        {"preprocessing": {"resize": 224, "mean": [0.5, 0.5]}, "precision": "fp32", "fold": True}, ({**TAP, "call": 1},)
    )
    assert a.differences(b) == [
        ("fold", None, True),
        ("preprocessing.resize", 256, 224),
        ("taps.penultimate@none.call", 0, 1),
    ]


def test_whole_floats_and_integers_are_the_same_number():
    assert Recipe({"scale": 1.0}, (TAP,)) == Recipe({"scale": 1}, (TAP,))


def test_json_round_trip_and_frozen_content():
    fields = {"preprocessing": {"mean": (0.485, 0.456)}, "storage_dtype": "float32"}
    recipe = Recipe(fields, (TAP,))
    digest = recipe.digest
    fields["preprocessing"]["mean"] = (0.0, 0.0)
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again.digest == recipe.digest == digest
    assert again.storage_dtype == "float32"


@pytest.mark.parametrize(
    ("fields", "taps", "message"),
    [
        ({"schema": 2}, (TAP,), "recipe of schema 2, this version knows schema 1. Update featurecache."),
        ({"taps": []}, (TAP,), "taps are given as `taps`"),
        ({}, (), "needs one tap or more"),
        ({}, (TAP, TAP), "with names of their own"),
        ({}, ({"module": "x"},), "a tap needs a name"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(fields, taps, message):
    with pytest.raises(InputError, match=message):
        Recipe(fields, taps)


def test_from_json_needs_taps():
    with pytest.raises(InputError, match="no list of taps"):
        Recipe.from_json({"schema": 1})


def test_values_in_messages():
    assert shortened("a" * 64) == "aaaaaaaaaaaa..."
    assert shortened("z" * 64) == repr("z" * 64)
    assert shortened([0.485, 0.456, 0.406]) == "[0.485, 0.456, 0.406]"
    assert shortened("cpu") == "'cpu'"
    assert shortened(None) == "none"
