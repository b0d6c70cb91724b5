import pytest

from featurecache import errors
from featurecache.errors import FeatureCacheError, InputError, LockedError, ReadError, did_you_mean


@pytest.mark.parametrize(
    ("error", "builtin", "status"),
    [
        (errors.InputError("x"), ValueError, 2),
        (errors.MissingFileError("x"), FileNotFoundError, 2),
        (errors.ReadError("x"), ValueError, 1),
        (errors.RecipeMismatchError("x"), ValueError, 2),
        (errors.StoreError("x"), RuntimeError, 1),
        (errors.CorruptionError("x"), RuntimeError, 1),
        (errors.LockedError("x", pid=3), BlockingIOError, 1),
        (errors.RunError("x"), RuntimeError, 2),
        (errors.DependencyError("x"), ImportError, 2),
    ],
)
def test_each_is_a_builtin_too_and_knows_its_exit_status(error, builtin, status):
    assert isinstance(error, FeatureCacheError)
    assert isinstance(error, builtin)
    assert error.exit_status == status
    assert str(error) == "x"


def test_all_problems_are_kept_and_the_first_are_shown():
    error = InputError.from_problems("summary", [f"p{i}" for i in range(25)])
    assert len(error.problems) == 25
    assert str(error).splitlines()[0] == "summary"
    assert str(error).splitlines()[-1] == "  - ... and 5 more"
    assert len(str(error).splitlines()) == 22
    assert str(InputError.from_problems("s", ["a"])) == "s\n  - a"


def test_what_else_errors_carry():
    assert LockedError("x", pid=7).pid == 7
    assert ReadError("x").deterministic
    assert not ReadError("x", deterministic=False).deterministic


@pytest.mark.parametrize(
    ("name", "near"),
    [("frontl", " Did you mean 'frontal'?"), ("LATERAL", " Did you mean 'lateral'?"), ("xyz", ""), ("", "")],
)
def test_near_names(name, near):
    assert did_you_mean(name, ["frontal", "lateral"]) == near


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("id_column", "id"), ("--id-column", "id"), ("view_colum", "view_column"), ("viewcolumn", "view_column"),
        ("out path", "out"), ("xyz", ""),
    ],
)  # fmt: skip
def test_a_choice_that_is_a_word_of_the_name_is_near(name, near):
    assert did_you_mean(name, ["view_column", "path_column", "id", "out"]) == (near and f" Did you mean {near!r}?")
