"""Every command and every Python block of the README and the guides is run, in order, in a folder of its own.

A page says by a comment what it needs (`<!-- needs: two-view -->`); a block after `<!-- file: NAME -->` is written to
that file, one after `<!-- not run: WHY -->` is left out. Blocks without a language are output or sketches.
"""

from __future__ import annotations

import csv
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurecache.cli import main
from featurecache.data.shipped import shipped_path
from featurecache.pipeline.makers import emoji_masks

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (file|not run): ([^>]+?) -->\n+)?```(\w*)\n(.*?)```", re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, str, str]]:
    """(mark, its value, language, text) of each block."""
    return [found.groups(default="") for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def needs(page: Path) -> list[str]:
    found = re.search(r"<!-- needs: ([\w -]+) -->", page.read_text(encoding="utf-8"))
    return found[1].split() if found else []


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def emoji(folder: Path) -> None:
    """Every eighth of the shipped emoji, under the names that the README gives."""
    source = shipped_path("emoji")
    with (source / "manifest.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[::8]
    for row in rows:
        for view in ("google", "twitter"):
            target = folder / "emoji" / row[view]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((source / row[view]).read_bytes())
    write_csv(folder / "emoji" / "manifest.csv", rows)


def two_view(folder: Path, n: int = 72) -> None:
    """Manifest of two views with something to learn, and tables of other samples."""
    rng = np.random.default_rng(0)
    (folder / "img").mkdir()
    rows: list[dict[str, object]] = []
    for i in range(n):
        ill = i % 2
        row: dict[str, object] = {"sample_id": f"s{i + 1}"}
        for view, letter in (("frontal", "f"), ("lateral", "l")):
            pixels = rng.integers(0, 120, (72, 64, 3)) + (90 * ill if view == "frontal" or i % 3 else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "img" / f"{i + 1}{letter}.png")
            row[view] = "" if view == "lateral" and i == 1 else f"img/{i + 1}{letter}.png"
        rows.append({**row, "label": ("healthy", "ill")[ill], "group": f"patient-{i // 3}", "site": f"site-{i % 2}"})
    write_csv(folder / "manifest.csv", rows[: n - 16])
    write_csv(folder / "new.csv", rows[n - 16 : n - 8])
    write_csv(folder / "external.csv", rows[n - 16 :])
    names = {"sample_id": "study", "frontal": "front image", "lateral": "side image", "group": "patient"}
    findings = [{names.get(name, name): value for name, value in row.items()} for row in rows]
    for i, row in enumerate(findings):
        row["finding"] = "uncertain" if i % 9 == 4 else ("no", "yes")[i % 2]
    write_csv(folder / "studies.csv", findings)


def xray(folder: Path, n: int = 60) -> None:
    """DICOM files of one or two views a study, and a table with a row for each."""
    pydicom = pytest.importorskip("pydicom", reason="the page is about DICOM: pip install 'featurecache[dicom]'")
    dataset = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    rng = np.random.default_rng(0)
    (folder / "dicom").mkdir()
    base = dataset.pixel_array.copy()
    rows: list[dict[str, object]] = []
    for i in range(n):
        edema = i % 2
        labels = {"Edema": -1 if i % 11 == 5 else edema, "Effusion": "" if i % 7 == 3 else int(i % 4 < 2)}
        for number, position in enumerate((("AP",), ("PA", "LATERAL"), ("PA", "LL"))[min(i % 5, 2)], 1):
            noise = rng.integers(0, 200, base.shape) + 600 * edema
            dataset.PixelData = (base + noise).astype(base.dtype).tobytes()
            path = f"dicom/{50001 + i}-{number}.dcm"
            dataset.save_as(folder / path)
            subject = 10001 + i // 2
            rows.append({"study_id": 50001 + i, "subject_id": subject, "ViewPosition": position, "path": path,
                         **labels, "site": f"site-{i % 2}"})  # fmt: skip
    write_csv(folder / "studies.csv", rows)


def masks(folder: Path) -> None:
    """Emoji over photo-like backgrounds with their masks, and a table of other ones."""
    emoji_masks(folder, n=40, size=64)
    lines = (folder / "manifest.csv").read_text(encoding="utf-8").splitlines()
    (folder / "manifest.csv").write_text("\n".join(lines[:33]), encoding="utf-8")
    (folder / "new.csv").write_text("\n".join([lines[0], *lines[33:]]), encoding="utf-8")


def store(folder: Path) -> None:
    """The store that the guide on two views makes."""
    two_view(folder)
    run("featurecache extract manifest.csv --store cache --view frontal=frontal --view lateral=lateral "
        "--body torchvision/squeezenet1_1 --weights shipped --image-size 64 --store-dtype float32")  # fmt: skip


NEEDS = {"emoji": emoji, "two-view": two_view, "xray": xray, "store": store, "masks": masks}


def run(command: str) -> None:
    """One command line, in this process."""
    words = shlex.split(command)
    assert words[0] == "featurecache", command
    before, sys.argv = sys.argv, words
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    assert ended.value.code == 0, command


def commands(text: str) -> list[str]:
    """What follows `$ `, with its continued lines."""
    joined = text.replace("\\\n", " ")
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for need in needs(page):
        NEEDS[need](tmp_path)
    space: dict[str, object] = {"__name__": "docs"}
    for mark, value, language, text in blocks(page):
        if mark == "not run":
            continue
        if mark == "file":
            (tmp_path / value).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, str(page), "exec"), space)
        elif language == "console":
            for command in commands(text):
                run(command)


def test_blocks_are_of_known_kinds():
    """Nothing that looks like code escapes: a language that is neither run nor shown as data is a mistake."""
    for page in PAGES:
        for mark, _, language, text in blocks(page):
            assert language in ("", "console", "python", "bash", "toml", "csv"), (page.name, language)
            assert language == "console" or mark == "not run" or not commands(text), (page.name, text)


def test_pages_are_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f" {page.name}\n" in menu, page.name
