import pytest

from featurecache import config
from featurecache.cli import options as opt
from featurecache.errors import InputError
from featurecache.heads.fc import FCSettings


def test_the_mark_of_all_views_is_that_of_the_configuration():
    assert opt.ANY_VIEW == config.ANY_VIEW


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (None, {}),
        (["x"], {"*": "x"}),
        (["a=x", "b=y"], {"a": "x", "b": "y"}),
        (["x", "a=y"], {"*": "x", "a": "y"}),
        (["a=y", "x"], {"*": "x"}),
        (["a=x", "a=y"], {"a": "y"}),
        (["dir=1/w.pth"], {"*": "dir=1/w.pth"}),
        (["a=dir=1/w.pth"], {"a": "dir=1/w.pth"}),
    ],
)
def test_once_or_per_view_and_the_last_one_wins(values, found):
    assert opt.per_view("--weights", values, ["a", "b"]) == found


def test_a_mistyped_view_names_the_near_one():
    with pytest.raises(InputError, match=r"--body 'frontl=x': no view 'frontl'. Did you mean 'frontal'"):
        opt.per_view("--body", ["frontl=x"], ["frontal", "lateral"])
    with pytest.raises(InputError, match=r"--tap 'frontl=x': no view 'frontl'"):
        opt.taps(["frontl=x"], ["frontal"])


def test_taps_add_up():
    assert opt.taps(["a=x", "y", "a=z:avg"], ["a"]) == {"a": ["x", "z:avg"], "*": ["y"]}
    assert opt.named_views(["a=x", "y", "b=z"]) == ["a", "b"]


@pytest.mark.parametrize("value", ["a", "=x", "a="])
def test_pairs_need_both_sides(value):
    with pytest.raises(InputError, match=f"--view '{value}': write NAME=VALUE"):
        opt.pairs("--view", [value])


def test_lists():
    assert opt.listed("a, b,") == ("a", "b")
    assert opt.listed(None) == ()
    assert opt.numbers("--mean", {"*": "1,2"}) == {"*": ["1", "2"]}


def test_settings_take_several_values_and_none():
    values = ["hidden=32,16", "class_weight=none", "epochs=3"]
    found = opt.settings(values, FCSettings.model_fields)
    assert found == {"hidden": ("32", "16"), "class_weight": None, "epochs": "3"}
    assert FCSettings.create(found).hidden == (32, 16)
    assert FCSettings.create(opt.settings(["hidden=[8]"], FCSettings.model_fields)).hidden == (8,)
    assert opt.settings(["hiden=3"], FCSettings.model_fields) == {"hiden": "3"}
