"""Where the files of a manifest are: resolved against the root, checked to exist and to stay inside it.

For hundreds of thousands of paths: each distinct directory is resolved once and listed once; a file is looked at by
itself only if it is a link, or if few files of its directory are wanted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence

import polars as pl

_FEW = 8  # below this many wanted files, asking for each is cheaper than listing a directory of unknown size


Early = Callable[[pl.Series], None]
"""Told the paths below the root as they are written, before they are resolved: nearly always where the files are."""


def locate(values: pl.Series, root: str, *, allow_outside: bool, early: Early | None = None) -> pl.DataFrame:
    """Resolve and check each distinct path.

    Args:
        values: paths as written, without nulls.
        root: what relative paths are relative to.
        allow_outside: whether a path may leave the root.
        early: see `Early`.

    Returns:
        One row per distinct value: value, location (String, null where there is a problem), problem (String|null).
    """
    base = os.path.realpath(root)
    path = pl.col("value").str.replace_all("\\", "/", literal=True) if os.sep == "\\" else pl.col("value")
    absolute = path.str.contains(r"^([A-Za-z]:)?/") if os.sep == "\\" else path.str.starts_with("/")
    prefix = base.replace(os.sep, "/").rstrip("/") + "/"
    full = pl.when(absolute).then(path).otherwise(pl.lit(prefix) + path)
    table = values.unique(maintain_order=True).rename("value").to_frame()
    table = table.with_columns(full.alias("full"))
    if early is not None:
        early(table["full"].filter(table["full"].str.starts_with(prefix)).unique())
    table = table.with_columns(pl.col("full").str.replace(r"/[^/]*$", "/").alias("folder"))
    table = table.with_columns(pl.col("full").str.strip_prefix(pl.col("folder")).alias("name"))
    folders = table.group_by("folder", maintain_order=True).agg("name")
    inside = _Inside(base, allow_outside)
    resolved: dict[str, str] = {}
    found: list[tuple[str, str | None]] = []
    special: list[tuple[str, str, str | None, str | None]] = []
    for folder, names in zip(folders["folder"].to_list(), folders["name"].to_list(), strict=True):
        real = _resolve(folder.rstrip("/") or "/", resolved)
        problem = None if inside(real) else f"leaves the root {base}: it is in {real}"
        found.append((folder, None if problem else real.rstrip("/") + "/"))
        if problem:
            special += [(folder, name, None, problem) for name in names]
        else:
            special += [(folder, name, *checked) for name, checked in _look(real, names, inside, base)]
    result = table.join(_frame(found, ["folder", "real"]), on="folder", how="left", maintain_order="left")
    columns = ["folder", "name", "location", "problem"]
    result = result.join(_frame(special, columns), on=["folder", "name"], how="left", maintain_order="left")
    direct = pl.when(pl.col("problem").is_null()).then(pl.col("real") + pl.col("name"))
    return result.select("value", pl.coalesce("location", direct).alias("location"), "problem")


class _Inside:
    """Whether a resolved path lies in the root."""

    def __init__(self, root: str, allow_outside: bool) -> None:
        self.root, self.prefix, self.anywhere = root, root.rstrip(os.sep) + os.sep, allow_outside

    def __call__(self, path: str) -> bool:
        return self.anywhere or path == self.root or path.startswith(self.prefix)


def _resolve(folder: str, known: dict[str, str]) -> str:
    """`os.path.realpath`, with one look per distinct directory."""
    if folder in known:
        return known[folder]
    parent, name = os.path.split(folder)
    if not name:  # the top, or a doubled slash
        real = folder if parent == folder else _resolve(parent, known)
    elif name == os.curdir:
        real = _resolve(parent, known)
    elif name == os.pardir:
        real = os.path.dirname(_resolve(parent, known))
    else:
        real = os.path.join(_resolve(parent, known), name)
        try:
            if stat.S_ISLNK(os.lstat(real).st_mode):
                real = os.path.realpath(real)
        except (OSError, ValueError):
            pass  # it does not exist, which shows when it is looked into
    known[folder] = real
    return real


def _look(
    folder: str, names: Sequence[str], inside: _Inside, root: str
) -> list[tuple[str, tuple[str | None, str | None]]]:
    """What is not simply a file: (name, (location, problem)) of links, and of all that is missing or no file."""
    wanted = names if len(names) < _FEW else sorted(set(names) - _files(folder))
    kinds = _kinds(folder, wanted)
    odd: list[tuple[str, tuple[str | None, str | None]]] = []
    for name in wanted:
        kind = kinds.get(name)
        if kind == "file":
            continue
        if kind == "link":
            odd.append((name, _follow(os.path.join(folder, name), inside, root)))
        elif kind == "folder" or name in ("", os.curdir, os.pardir):
            odd.append((name, (None, "is a folder, not a file")))
        elif kind == "other":
            odd.append((name, (None, "is not a regular file")))
        elif not os.path.isdir(folder):
            odd.append((name, (None, f"no such file: there is no folder {folder}")))
        else:
            odd.append((name, (None, f"no such file in {folder}")))
    return odd


def _follow(path: str, inside: _Inside, root: str) -> tuple[str | None, str | None]:
    target = os.path.realpath(path)
    if not inside(target):
        return None, f"leaves the root {root}: it is a link to {target}"
    if not os.path.exists(target):
        return None, f"is a broken link, to {target}"
    return (target, None) if os.path.isfile(target) else (None, "is a link to something that is not a file")


def _kinds(folder: str, names: Sequence[str]) -> dict[str, str]:
    kinds = {}
    for name in names:
        try:
            mode = os.lstat(os.path.join(folder, name)).st_mode
        except (OSError, ValueError):  # ValueError: a zero byte in the name
            continue
        checks = (("file", stat.S_ISREG), ("link", stat.S_ISLNK), ("folder", stat.S_ISDIR))
        kinds[name] = next((kind for kind, check in checks if check(mode)), "other")
    return kinds


def _files(folder: str) -> set[str]:
    """The plain files of a folder; none where it can't be listed: it may still be entered."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
    except OSError:
        return set()


def _frame(rows: Sequence[tuple[str | None, ...]], columns: list[str]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row")
