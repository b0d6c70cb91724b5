"""Calls from Python in the journals of stores and runs."""

import pytest
from stage_two import command, write_store

import featurecache as fc
from featurecache import journal
from featurecache.calls import also, record
from featurecache.errors import InputError


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A store, a run on it, and what their journals hold so far."""
    folder = tmp_path_factory.mktemp("calls")
    store = write_store(folder, 24, missing=0.0)
    dataset = fc.FeatureDataset(store, dataset="m", target="label")
    fc.fit_head(
        dataset, head="logistic", out=folder / "run", settings={"max_iter": 20}, images="none", bootstrap=0,
        about=None, seed=3,
    )  # fmt: skip
    return folder, dataset


def entries(path):
    return [journal.read(path, name) for name in journal.listed(path)]


def test_a_call_is_kept_by_its_store_and_by_the_run_that_it_makes(home):
    folder, dataset = home
    for place in (folder / "store", folder / "run"):
        found = entries(place)[0]
        assert found["command"] == "fit-head"
        assert found["line"] == (
            "featurecache.fit_head(dataset='m', head='logistic', out='run', settings={'max_iter': 20}, "
            "images='none', bootstrap=0, about=None, seed=3)"
        )
        assert found["figures"]["run"] == "run"
        assert 0 <= found["figures"]["test_accuracy"] <= 1
        assert "| fit-head | done |" in (place / "summary.md").read_text()
    command = fc.load_run(folder / "run").record["command"]
    assert command.startswith("featurecache.fit_head(dataset='m', head='logistic', out='")
    assert str(folder) not in command
    fc.export(dataset, folder / "f.npz", format="npz")
    assert entries(folder / "store")[-1]["line"] == "featurecache.export(dataset='m', out='f.npz', format='npz')"


def test_what_goes_wrong_is_kept_too(home):
    folder, dataset = home
    with pytest.raises(InputError, match="no such"):
        fc.evaluate(folder / "run", by="nothing", table=folder / "none.csv")
    found = entries(folder / "run")[-1]
    assert (found["command"], found["status"]) == ("evaluate", "failed")
    assert "none.csv" in found["error"]
    assert str(folder) not in found["error"]
    with pytest.raises(InputError):
        fc.fit_head(dataset, head="logistik")
    assert "logistik" in entries(folder / "store")[-1]["error"]
    with pytest.raises(TypeError, match="store"):
        fc.extract("m.csv")


def test_a_store_that_can_only_be_read_serves_all_the_same(home, monkeypatch, tmp_path):
    folder, dataset = home
    before = len(entries(folder / "store"))

    def refused(*words, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(journal, "publish", refused)
    assert fc.explore(dataset, tmp_path / "e.html", images="none").samples == 24
    assert len(entries(folder / "store")) == before


def test_of_calls_within_a_command_only_the_command_is_kept(home):
    folder, _ = home
    store = folder / "store"
    before = len(entries(store))
    with record("outer", "featurecache outer", []):
        fc.export(fc.FeatureDataset(store, dataset="m"), folder / "g.npz", format="npz")
        also(folder / "run")
    found = entries(store)[before:]
    assert [each["line"] for each in found] == ["featurecache outer"]
    assert entries(folder / "run")[-1]["command"] == "outer"
    assert command("export", store, "--dataset", "m", "--out", folder / "h.parquet").status == 0
    assert [each["command"] for each in entries(store)[before:]] == ["outer", "export"]
    also(folder)  # nothing is open: nothing happens


def test_beside_the_first_process_of_torchrun_none_is_kept(home, monkeypatch):
    folder, dataset = home
    before = len(entries(folder / "store"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "1")
    fc.export(dataset, folder / "i.npz", format="npz")
    assert len(entries(folder / "store")) == before
