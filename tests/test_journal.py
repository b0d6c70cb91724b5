import json
import os
import re
import sqlite3
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer
from stage_two import command, write_store

from featurecache import journal
from featurecache.cli import output
from featurecache.rundir.record import package_version

WHEN = datetime(2026, 11, 22, 7, 30, tzinfo=UTC)


@pytest.fixture
def store(tmp_path):
    """What makes a directory a store, as far as a journal asks."""
    path = tmp_path / "cache"
    path.mkdir()
    sqlite3.connect(path / "index.sqlite").close()
    (path / "index.sqlite").touch()
    return path


def entry(**changed):
    values = {"command": "extract", "line": "featurecache extract m.csv", "status": "done", "started": WHEN}
    return journal.entry(**{**values, "seconds": 1.25, "figures": {"images": 1200}, **changed})


def entries(path):
    return [journal.read(path, name) for name in journal.listed(path)]


def run(body, *journals, name="verify"):
    try:
        with output.command(name, as_json=False, quiet=True, debug=False, journals=journals) as told:
            body(told)
    except typer.Exit:
        pass


def test_an_entry_says_what_was_done(store):
    figures = {
        "images": 1200,
        "recipes": {"a": "12ab"},
        "problems": ["s1"],
        "nested": {"a": {"b": 1}},
        "x": float("nan"),
    }
    journal.add(store, entry(figures=figures, failed=2))
    (found,) = entries(store)
    assert found["figures"] == {"images": 1200, "recipes": {"a": "12ab"}, "x": None}
    assert (found["command"], found["status"], found["failed"], found["seconds"]) == ("extract", "done", 2, 1.25)
    assert found["featurecache"] == package_version()
    assert found["versions"]["numpy"] == sys.modules["numpy"].__version__
    (name,) = journal.listed(store)
    assert re.fullmatch(r"20261122T073000\.000Z-\d+\.json", name)


def test_the_summary_is_a_table_of_the_entries_the_newest_first(store):
    journal.add(store, entry())
    later = WHEN.replace(minute=31)
    journal.add(store, entry(started=later, command="verify", status="failed", figures={}, error="a | b <script>\nc"))
    rows = [line for line in (store / "summary.md").read_text().splitlines() if line.startswith("| 2026")]
    assert rows == [
        "| 2026-11-22 07:31:00 | verify | failed | 1.2 | a \\| b &lt;script> c |",
        "| 2026-11-22 07:30:00 | extract | done | 1.2 | images 1,200 |",
    ]


def test_no_absolute_path_is_kept(store, tmp_path):
    line = f"featurecache extract {tmp_path}/m.csv --store {store} --root /data/secret/images --weights a=/w/x.pth"
    error = f"{store}/features.zarr: gone; see /data/secret/images/a.png, ~/there/b.png and https://a.b/c (1/2)"
    journal.add(store, entry(line=line, error=error, figures={"run": f"{tmp_path}/runs/x"}))
    (found,) = entries(store)
    assert found["line"] == "featurecache extract m.csv --store cache --root images --weights a=x.pth"
    assert found["error"] == "cache/features.zarr: gone; see a.png, b.png and https://a.b/c (1/2)"
    assert found["figures"] == {"run": "runs/x"}
    text = "".join(path.read_text() for path in store.rglob("*") if path.suffix in (".json", ".md"))
    assert str(tmp_path) not in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("error", "status"), [(None, "done"), (KeyboardInterrupt(), "interrupted"), (KeyError("x"), "failed")]
)
def test_however_a_command_ends_it_is_recorded(store, tmp_path, error, status, capsys):
    def body(told):
        told.figures = {"rows": 3}
        if error is not None:
            raise error

    run(body, store, tmp_path / "no-store", None)
    (found,) = entries(store)
    assert (found["command"], found["status"], found["figures"]) == ("verify", status, {"rows": 3})
    assert bool(found["error"]) == (error is not None)
    assert found["error"] in capsys.readouterr().err
    assert not (tmp_path / "no-store").exists()


def test_a_run_and_a_joint_run_to_be_resumed_have_journals(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    (tmp_path / "joint.tmp" / "checkpoint").mkdir(parents=True)
    (tmp_path / "copy.tmp").mkdir()
    assert journal.keeper(tmp_path / "run") == tmp_path / "run"
    assert journal.keeper(tmp_path / "joint.tmp") == tmp_path / "joint.tmp"
    assert journal.keeper(tmp_path / "joint") is journal.keeper(tmp_path / "copy.tmp") is None


def test_one_place_named_twice_gets_one_entry(store, monkeypatch):
    monkeypatch.chdir(store.parent)
    run(lambda told: told.journals.append(store), Path("cache"))
    assert len(entries(store)) == 1


def test_what_can_not_be_written_is_passed_over(store, monkeypatch, capsys):
    def refused(*words, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(journal.Path, "mkdir", refused)
    run(lambda told: told.outputs.append("x"), store)
    assert capsys.readouterr() == ("x\n", "")
    assert not (store / "runs").exists()


def test_old_entries_go_and_the_table_says_how_many_are_not_in_it(store, monkeypatch):
    monkeypatch.setattr(journal, "KEPT", 6)
    monkeypatch.setattr(journal, "SHOWN", 4)
    for minute in range(9):
        journal.add(store, entry(started=WHEN.replace(minute=minute)))
    assert [found["started"][14:16] for found in entries(store)] == ["03", "04", "05", "06", "07", "08"]
    text = (store / "summary.md").read_text()
    assert [line[16:18] for line in text.splitlines() if line.startswith("| 2026")] == ["08", "07", "06", "05"]
    assert "2 older ones are in `runs/` alone." in text


def test_many_at_once_lose_no_entry(store):
    """Whoever writes the table last has them all in it."""

    def work(number):
        for n in range(4):
            journal.add(store, entry(started=WHEN.replace(minute=number, second=n)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entries(store)) == 24
    assert (store / "summary.md").read_text().count("| extract |") == 24
    assert [name for name in os.listdir(store / "runs") if name.startswith(".")] == []
    journal.add(store, entry())
    journal.add(store, entry())
    assert len(entries(store)) == 26


def test_a_table_that_another_process_overtook_is_written_again(store, monkeypatch):
    journal.add(store, entry())
    publish = journal.publish

    def overtaken(path, file, text):
        monkeypatch.setattr(journal, "publish", publish)
        publish(path, path / "runs" / "20261122T080000.000Z-1.json", json.dumps({**entry(), "command": "other"}))
        publish(path, file, text)

    monkeypatch.setattr(journal, "publish", overtaken)
    journal.summarise(store)
    assert "| other |" in (store / "summary.md").read_text()


def test_entries_that_are_in_the_table_are_not_read_again(store, monkeypatch):
    for minute in range(5):
        journal.add(store, entry(started=WHEN.replace(minute=minute)))
    before, asked, read = (store / "summary.md").read_text(), [], journal.read
    monkeypatch.setattr(journal, "read", lambda path, name: asked.append(name) or read(path, name))
    journal.add(store, entry(command="verify"))
    assert len(asked) == 1
    added = (store / "summary.md").read_text()
    assert added == before.replace(
        "---: | --- |\n", "---: | --- |\n| 2026-11-22 07:30:00 | verify | done | 1.2 | images 1,200 |\n"
    )
    journal.summarise(store)
    assert (store / "summary.md").read_text() == added, "as it is when all are read"
    (store / "summary.md").unlink()
    asked.clear()
    journal.add(store, entry(command="verify"))
    assert len(asked) == 7


def test_a_damaged_entry_is_passed_over(store):
    journal.add(store, entry())
    (store / "runs" / "20261122T080000.000Z-1.json").write_text("{")
    (store / "runs" / "20261122T080000.000Z-2.json").write_text("[1]")
    journal.add(store, entry(command="verify"))
    assert (store / "summary.md").read_text().count("| 2026") == 2


def test_ids_that_are_withheld_are_in_no_file(store):
    journal.add(store, entry(line="featurecache extract m.csv", error="p17 frontal: broken"))
    journal.add(store, entry(command="explore", line="featurecache forget cache --id p17"))
    journal.add(store, entry(command="verify"))
    (store / "runs" / ".x.json.1").write_text("p17, by a process that was killed")
    journal.withhold(store, ["p17", ""])
    assert not any(b"p17" in path.read_bytes() for path in store.rglob("*") if path.is_file())
    found = {each["command"]: each for each in entries(store)}
    assert found["extract"]["error"] == found["explore"]["line"] == "(withheld)"
    assert found["verify"]["line"] == "featurecache extract m.csv"
    assert "(withheld)" in (store / "summary.md").read_text()
    assert entry(line="featurecache forget cache --id p17", withheld=["p17"])["line"] == "(withheld)"


def test_commands_on_a_store_and_a_run(tmp_path):
    store = write_store(tmp_path, 24, missing=0.0)
    assert command("verify", store).status == 0
    options = ("--dataset", "m", "--target", "label", "--head", "logistic", "--images", "none", "--bootstrap", "0")
    done = command("fit-head", store, *options, "--out", tmp_path / "run")
    assert done.status == 0, done.err
    assert command("fit-head", store, *options[:3], "lable", "--out", tmp_path / "other").status == 2
    assert command("fit-head", store, *options, "--out", tmp_path / "run").status == 2, (
        "nor told in the run that is there"
    )
    assert command("report", tmp_path / "run", "--images", "none").status == 0
    for words in (("info", store), ("prune", store, "--dry-run"), ("evaluate", tmp_path / "run")):
        assert command(*words).status == 0
    assert [found["command"] for found in entries(store)] == ["verify", "fit-head", "fit-head", "fit-head"]
    assert [found["status"] for found in entries(store)] == ["done", "done", "failed", "failed"]
    assert "no column 'lable'" in entries(store)[2]["error"]
    assert [found["command"] for found in entries(tmp_path / "run")] == ["fit-head", "report"]
    assert entries(tmp_path / "run")[0]["figures"]["task"] == "binary"
    assert command("verify", store, "--json").json["problems"] == []
    assert command("evaluate", tmp_path / "run").status == 0, "the journal is no part of what the run's hashes cover"
    done = command("forget", store, "--id", "s003", "--yes")
    assert done.status == 0, done.err
    last = entries(store)[-1]
    assert (last["command"], last["line"], last["figures"]["rows"]) == ("forget", "(withheld)", 2)
