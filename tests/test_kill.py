"""The second promise: a run may be killed at any instant; the next one goes on, and the result is that of one run."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extract_kit import command_environment, features, json_of, plain_rows, recipe_ids, states, write_images
from zygote import shared

TAP = "penultimate@none"


def words(manifest: Path, store: Path, precision: str, *more: Any) -> list[str]:
    return [
        "extract", str(manifest), "--store", str(store), "--view", "image=image", "--body", "plugin_extract:slow",
        "--engine", "torch", "--precision", precision, "--store-dtype", "float32", "--rows-per-chunk", "32",
        "--batch-size", "16", "--json",
        *map(str, more),
    ]  # fmt: skip


def committed(store: Path) -> int:
    """Rows that the index knows of; 0 while there is no index."""
    try:
        with closing(sqlite3.connect(f"file:{store}/index.sqlite?mode=ro", uri=True, timeout=10)) as connection:
            return int(connection.execute("SELECT COUNT(*) FROM rows").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def wait_for(store: Path, rows: int, process: Any) -> None:
    while committed(store) < rows and process.poll() is None:
        time.sleep(0.005)


def check_equal(store: Path, reference: Path, n: int, precision: str) -> None:
    """The set of rows is exact, none is there twice, and features are those of the run that nobody disturbed."""
    (recipe,) = recipe_ids(store)
    mine, theirs = plain_rows(store, recipe, TAP), plain_rows(reference, recipe, TAP)
    assert mine.keys() == theirs.keys()
    assert len(mine) == n
    assert set(states(store).values()) == {"done"}
    by_sample = features(store)
    assert len(by_sample) == n
    for sample, row in features(reference).items():
        if precision == "bf16":
            np.testing.assert_array_equal(by_sample[sample], row)
        else:
            np.testing.assert_allclose(by_sample[sample], row, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_kills(tmp_path, precision):
    n = 224
    manifest, store = write_images(tmp_path / "data", n, side=8), tmp_path / "store"
    zygote = shared()
    assert zygote.run(tmp_path, *words(manifest, tmp_path / "reference", precision)).status == 0
    rng, reused = random.Random(5), []
    for rows in (32, 96, 128):
        process = zygote.start(tmp_path, *words(manifest, store, precision))
        wait_for(store, rows, process)
        time.sleep(rng.uniform(0, 0.05))
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert committed(store) % 32 == 0
        reused.append(committed(store))
    assert 0 < reused[0] < reused[1] < reused[2] < n
    process = zygote.run(tmp_path, *words(manifest, store, precision))
    assert process.status == 0, process.err
    figures = json_of(process.out)
    assert (figures["computed"], figures["reused"], figures["failed"]) == (n - reused[2], reused[2], [])
    check_equal(store, tmp_path / "reference", n, precision)


@pytest.mark.parametrize(
    ("number", "more"),
    [(signal.SIGINT, ()), (signal.SIGTERM, ()), (signal.SIGINT, (0.003, 0, 0.01, 0.03))],
    ids=["SIGINT", "SIGTERM", "SIGINT again and again"],
)
def test_interrupted(tmp_path, number, more):
    """130, what was complete is committed (a partial chunk too) and bound, and the next run takes it."""
    n = 200
    manifest, store = write_images(tmp_path / "data", n, side=8), tmp_path / "store"
    process = shared().start(tmp_path, *words(manifest, store, "fp32"))
    wait_for(store, 64, process)
    process.send(number)
    for pause in more:
        time.sleep(pause)
        process.send(number)
    assert process.wait() == 130, process.err
    assert "Interrupted. What was complete is kept; run the same command again to go on." in process.err.splitlines()
    assert json_of(process.out)["status"] == "interrupted"
    assert "Traceback" not in process.err
    kept = committed(store)
    assert 64 <= kept < n
    bound = list(states(store).values())
    assert (bound.count("done"), bound.count("pending")) == (kept, n - kept)
    assert len(features(store)) == kept
    process = shared().run(tmp_path, *words(manifest, store, "fp32"))
    figures = json_of(process.out)
    assert (process.status, figures["computed"], figures["reused"]) == (0, n - kept, kept)


def test_a_second_writer_is_told_who_writes(tmp_path):
    manifest, store = write_images(tmp_path / "data", 300, side=8), tmp_path / "store"
    process = shared().start(tmp_path / "first", *words(manifest, store, "fp32"))
    wait_for(store, 32, process)
    process.send(signal.SIGSTOP)  # however busy the machine is, it is not done before the second one asks
    second = shared().run(tmp_path / "second", *words(manifest, store, "fp32"))
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert second.status == 1
    assert f"process {process.pid}" in second.err
    assert str(store) in second.err
    assert "Traceback" not in second.err


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ten_kills_of_the_installed_command(tmp_path, precision, record):
    """Ten kill -9, at times uniform between the first and the last commit of a reference run of 60 commits."""
    n, reference, store = 60 * 32, tmp_path / "reference", tmp_path / "store"
    manifest = write_images(tmp_path / "data", n, side=8)
    command = str(Path(sys.executable).with_name("featurecache"))

    def start(target: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [command, *words(manifest, target, precision)], env=command_environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    process = start(reference)
    wait_for(reference, 32, process)
    first = time.monotonic()
    wait_for(reference, n, process)
    span = time.monotonic() - first
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json_of(out)["computed"] == n

    rng = random.Random(11)
    times = sorted(rng.uniform(0, span) for _ in range(10))  # after the first commit, in the reference's time
    at, kills, restarts_with_rows, ends = 0.0, 0, 0, []
    for moment in times:
        before = committed(store)
        process = start(store)
        wait_for(store, before + 32, process)  # this run's first commit, which is 1/60 of the span further on
        time.sleep(max(0.0, moment - at - span / 60))
        at = moment
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        restarts_with_rows += before > 0
        ends.append(committed(store))
    assert kills == 10
    assert restarts_with_rows >= 8
    assert ends == sorted(ends)
    assert all(rows % 32 == 0 for rows in ends)

    process = start(store)
    out, err = process.communicate()
    assert process.returncode == 0, err
    figures = json_of(out)
    assert (figures["computed"], figures["reused"], figures["failed"]) == (n - ends[-1], ends[-1], [])
    check_equal(store, reference, n, precision)
    record("command_kills_survived", kills)
