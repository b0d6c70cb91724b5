"""A store and a cross-validated run whose labels and ids are full of HTML: what pages must show as text."""

from __future__ import annotations

import csv
from pathlib import Path

from plugin_joint import write_samples
from stage_two import command

import featurecache as fc

EVIL = "<img src=x onerror=alert(1)></script><b>yes</b>"
EVIL_ID = 's000"><script>alert(2)</script>'
TWO = {"a": "a", "b": "b"}


def write_explored(folder: Path, n: int = 48) -> Path:
    """`cache` with dataset `samples` of views a and b, and `runs/cv` on `label`; s002 is a copy of s000's images."""
    path = write_samples(folder / "data", n, missing=0.1)
    with path.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        row["label"] = EVIL if row["label"] == "yes" else "no"
    rows[2] = {**rows[0], "sample_id": "s002", "label": EVIL}
    rows[0]["sample_id"] = EVIL_ID
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    fc.extract(path, store=folder / "cache", views=TWO, body="plugin_joint:tiny", engine="torch", precision="fp32")
    words = ["--dataset", "samples", "--target", "label", "--head", "logistic", "--cv", 3, "--bootstrap", 0]
    done = command("fit-head", folder / "cache", *words, "--out", folder / "runs" / "cv")
    assert done.status == 0, done.err
    return folder
