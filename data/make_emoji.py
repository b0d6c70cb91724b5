"""Rebuild the two-view emoji set in data/emoji/ bit for bit from two npm packages, or check it against them.

Every emoji is a sample, drawn once by Google (Noto) and once by Twitter (Twemoji): two views of the same thing. The
pictures are copied unchanged; manifest.csv is made from the packages' metadata and emoji_families.toml. Run one of::

    python data/make_emoji.py --check
    python data/make_emoji.py --google GOOGLE.tgz --twitter TWITTER.tgz --out DIR

A tarball that is not given is fetched with ``npm pack``. Standard library only.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VERSION = "16.0.0"
TARBALL_SHA256 = {
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}
VIEWS = tuple(TARBALL_SHA256)
# Component holds bare skin tones. Flags have other licences at their source. People & Body is mostly one picture in
# many skin tones and genders, so a split could hardly keep near-copies together.
DROPPED_CATEGORIES = frozenset({"Component", "Flags", "People & Body"})
COLUMNS = ("sample_id", *VIEWS, "category", "subcategory", "group")
FILE_SAFE = re.compile(r"[a-z0-9][a-z0-9_-]*")

Entry = Mapping[str, Any]


def package_name(view: str) -> str:
    """Name of the npm package that holds a view's pictures."""
    return f"emoji-datasource-{view}"


def fetch(view: str, folder: Path) -> Path:
    """Download a view's tarball with npm and return its path.

    Raises:
        FileNotFoundError: npm is not installed, or left no tarball.
        subprocess.CalledProcessError: npm failed.
    """
    command = ["npm", "pack", f"{package_name(view)}@{VERSION}", "--silent", "--pack-destination", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    path = folder / f"{package_name(view)}-{VERSION}.tgz"
    if not path.is_file():
        raise FileNotFoundError(f"npm pack reported success but {path.name} is not in {folder}")
    return path


def read_tarball(path: Path, view: str) -> tuple[list[Entry], dict[str, bytes]]:
    """Read a package's metadata and its 64-pixel pictures.

    Args:
        path: The tarball; its SHA-256 is checked before anything is unpacked.
        view: A name from `VIEWS`.

    Returns:
        The entries of emoji.json, and file name -> content of every 64-pixel PNG.

    Raises:
        ValueError: The tarball is another one than the data set was made from.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != TARBALL_SHA256[view]:
        raise ValueError(
            f"{path} has SHA-256 {found}, but {package_name(view)} {VERSION} has {TARBALL_SHA256[view]}: "
            f"get it with 'npm pack {package_name(view)}@{VERSION}'"
        )
    folder = f"package/img/{view}/64/"
    entries: list[Entry] = []
    images: dict[str, bytes] = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            wanted = member.name == "package/emoji.json" or (
                member.name.startswith(folder) and member.name.endswith(".png")
            )
            content = archive.extractfile(member) if wanted else None
            if content is None:
                continue
            if member.name == "package/emoji.json":
                entries = json.load(content)
            else:
                images[member.name.removeprefix(folder)] = content.read()
    return entries, images


def select(entries: Iterable[Entry]) -> list[Entry]:
    """Keep the entries that become samples, in Unicode's own order.

    Skin variations are nested inside an entry, so they are left out without any further rule.

    Raises:
        ValueError: A short name is used twice or cannot serve as a file name.
    """
    kept = [
        entry
        for entry in entries
        if entry["category"] not in DROPPED_CATEGORIES and all(entry[f"has_img_{view}"] for view in VIEWS)
    ]
    kept.sort(key=lambda entry: (entry["sort_order"], entry["unified"]))
    counts = Counter(str(entry["short_name"]) for entry in kept)
    bad = sorted(name for name, count in counts.items() if count > 1 or not FILE_SAFE.fullmatch(name))
    if bad:
        raise ValueError(f"short names that are used twice or are no safe file names: {', '.join(bad)}")
    return kept


def assign_groups(entries: Sequence[Entry], families: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Map each sample to its group: its family, or itself where it belongs to none.

    A group carries the id of its first member in Unicode's order.

    Args:
        entries: The selected entries, in order.
        families: Category -> family -> short names, separated by spaces.

    Returns:
        Sample id -> group, in the order of `entries`.

    Raises:
        ValueError: A family names an unknown sample, one of another category, or one that another family has too.
    """
    category_of = {str(entry["short_name"]): str(entry["category"]) for entry in entries}
    family_of: dict[str, tuple[str, str]] = {}
    for category, named in families.items():
        for family, members in named.items():
            for name in members.split():
                if category_of.get(name) != category:
                    raise ValueError(f"family {family!r}: {name!r} is not a sample of category {category!r}")
                if name in family_of:
                    raise ValueError(f"family {family!r}: {name!r} is in family {family_of[name][1]!r} already")
                family_of[name] = (category, family)
    first: dict[tuple[str, str], str] = {}
    return {name: first.setdefault(family_of[name], name) if name in family_of else name for name in category_of}


def manifest_csv(entries: Sequence[Entry], groups: Mapping[str, str]) -> bytes:
    """Write the wide manifest: a row per sample, and per view a path relative to the manifest's folder."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in entries:
        name = str(entry["short_name"])
        paths = [f"{view}/{name}.png" for view in VIEWS]
        writer.writerow([name, *paths, entry["category"], entry["subcategory"], groups[name]])
    return text.getvalue().encode("utf-8")


def build(tarballs: Mapping[str, Path]) -> dict[str, bytes]:
    """Make the whole data set in memory.

    Args:
        tarballs: View -> path of its npm tarball.

    Returns:
        Path below data/emoji, with forward slashes -> content.

    Raises:
        ValueError: A tarball is not the expected one, or the two disagree about the metadata.
    """
    unpacked = {view: read_tarball(tarballs[view], view) for view in VIEWS}
    if unpacked["google"][0] != unpacked["twitter"][0]:
        raise ValueError("the two packages hold different emoji.json files")
    entries = select(unpacked["google"][0])
    families = tomllib.loads((HERE / "emoji_families.toml").read_text(encoding="utf-8"))
    files = {"manifest.csv": manifest_csv(entries, assign_groups(entries, families))}
    for view in VIEWS:
        for entry in entries:
            files[f"{view}/{entry['short_name']}.png"] = unpacked[view][1][entry["image"]]
    return files


def differences(files: Mapping[str, bytes], folder: Path) -> list[str]:
    """List what differs between a built data set and a folder; the licences beside it are not generated."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    found = {path for path in found if not path.startswith("LICENSES/")}
    lines = [f"missing: {path}" for path in sorted(files.keys() - found)]
    lines += [f"not part of the data set: {path}" for path in sorted(found - files.keys())]
    common = sorted(files.keys() & found)
    return lines + [f"differs: {path}" for path in common if (folder / path).read_bytes() != files[path]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Build or check the data set; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for view in VIEWS:
        parser.add_argument(f"--{view}", type=Path, metavar="TGZ", help=f"{package_name(view)}-{VERSION}.tgz")
    parser.add_argument("--out", type=Path, default=HERE / "emoji", help="folder to write or check (data/emoji)")
    parser.add_argument("--check", action="store_true", help="write nothing, compare the folder with the packages")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        files = build({view: getattr(options, view) or fetch(view, Path(scratch)) for view in VIEWS})
    if not options.check:
        for path, content in files.items():
            target = options.out / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    lines = differences(files, options.out)
    print("\n".join(lines) or f"{options.out}: {len(files)} files, {sum(map(len, files.values())):,} bytes, as built")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
