"""`rm`, `prune`, `forget` and `compact` from the command line: listing, asking, exit statuses."""

import shlex

import pytest
from people_store import NAMES, PLAIN, traces, write_people
from stage_two import command, hashes, installed

from featurecache.store.store import FeatureStore


@pytest.fixture
def store(tmp_path):
    return write_people(tmp_path / "store")


@pytest.mark.parametrize(
    "words", [("rm", PLAIN.id), ("rm", "faces"), ("forget", "--id", NAMES[0], NAMES[1]), ("prune",)]
)
def test_it_lists_first_and_without_a_terminal_needs_yes(store, words):
    if words == ("prune",):
        command("rm", store, "people", "--yes")
    before = hashes(store)
    name, *rest = words
    done = command(name, store, *rest, "--dry-run")
    assert (done.status, done.out.splitlines()[-1]) == (0, "dry run: nothing was changed")
    assert done.err.splitlines()[-1] == f"Next: featurecache {shlex.join(map(str, (name, store, *rest)))}"
    listing = done.out.splitlines()[:-1]
    assert listing[-1].startswith(("in all", "note"))
    done = command(name, store, *rest)
    assert done.status == 2
    assert done.err.splitlines()[:-1] == listing
    assert done.err.endswith("There is no terminal to ask on: give --yes to drop this.\n")
    assert hashes(store) == before
    done = command(name, store, *rest, "--yes", "--json")
    assert (done.status, done.json["status"], done.json["dry_run"]) == (0, "done", False)
    assert done.json["scrubbed"]
    assert hashes(store) != before
    assert command("verify", store).status == 0


def test_on_a_terminal_it_asks(store, monkeypatch):
    before = hashes(store)
    for answer, status in (("n", 1), ("y", 0)):
        monkeypatch.setattr("typer.confirm", lambda text, err, answer=answer: answer == "y")
        monkeypatch.setattr("featurecache.cli.maintenance._terminal", lambda: True)
        done = command("rm", store, "faces")
        assert done.status == status
        assert "dataset   faces: its table and labels; rows stay" in done.err
        assert (hashes(store) == before) == (answer == "n")


def test_forget(store):
    done = command("forget", store, "--id", NAMES[0], "--yes")
    assert done.status == 0
    assert f"samples   1: {NAMES[0]}" in done.out
    assert "dataset   people: rewritten, 23 samples left" in done.out
    assert done.err.endswith(f"Next: featurecache verify {store}\n")
    assert traces(store, NAMES[0]) == {}
    done = command("forget", store, "--id", NAMES[0], "--yes")
    assert done.status == 2
    assert f"no sample '{NAMES[0]}'" in done.err
    assert command("forget", store).status == 2


def test_nothing_to_drop(store):
    done = command("prune", store)
    assert (done.status, done.out) == (0, "nothing to drop\n")


def test_a_writer_is_at_work(store):
    with FeatureStore(store, write=True):
        done = command("rm", store, "faces", "--yes")
    assert done.status == 1
    assert "is writing to this store" in done.err


def test_compact(store, tmp_path):
    done = installed("compact", store, "--out", tmp_path / "out", "--order", "people", "--json")
    assert done.status == 0, done.err
    assert (done.json["rows"], done.json["datasets"], done.json["outputs"]) == (138, 2, [str(tmp_path / "out")])
    assert command("compact", store, "--out", tmp_path / "out").status == 2


@pytest.mark.parametrize("name", ["rm", "prune", "forget", "compact"])
def test_help_and_no_store(tmp_path, name):
    done = command(name, "--help")
    assert f"Example: featurecache {name} cache" in done.out
    words = {"rm": ["x"], "forget": ["--id", "x"], "compact": ["--out", tmp_path / "out"]}.get(name, [])
    done = command(name, tmp_path / "none", *words)
    assert done.status == 2
    assert "no such store" in done.err
    assert not (tmp_path / "none").exists()
