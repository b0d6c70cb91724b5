"""What a run directory is on disk: its files and their hashes, its record, the lock and rename of its writer."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal, get_args

from featurecache.errors import RunError

Kind = Literal["head", "joint"]
SCHEMA = 1
RECORD = "run.json"
LOCK = ".writer"  # hidden names are never part of a run
# What later commands add to a finished run without touching its own files.
ABOUT = "about.toml"
ADDED_LATER = ("evaluations", "ablation", "explain", "runs", "summary.md", ABOUT)
# Pages for people, never read back: whoever completes the model card may change them.
DOCUMENTS = ("README.md", "report.html")
REQUIRED: Mapping[str, type | tuple[type, ...]] = {
    "task": str, "classes": list, "targets": list, "views": list, "recipes": dict, "config": dict,
}  # fmt: skip


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_files(directory: Path) -> dict[str, Path]:
    """Relative POSIX name -> path of all files that belong to a run, but for run.json itself."""
    found = {}
    for folder, folders, names in os.walk(directory):
        top = Path(folder) == directory
        names += [name for name in folders if (Path(folder) / name).is_symlink()]  # never followed, yet not overlooked
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not (top and name in ADDED_LATER))
        for name in sorted(names):
            path = Path(folder) / name
            if not name.startswith(".") and not (top and name in (RECORD, *ADDED_LATER)):
                found[path.relative_to(directory).as_posix()] = path
    return found


def check_files(directory: Path, listed: Mapping[str, str]) -> None:
    """Compare every file of a run that is ever read back with the SHA-256 that its record lists.

    What people write into is theirs: the model card has gaps to fill in, and files that the record does not list are
    left alone, since nothing reads them.

    Raises:
        RunError: names the file that is missing or changed.
    """
    found = own_files(directory)
    for name in sorted(listed):
        if name not in found and name not in DOCUMENTS:
            raise RunError(f"{directory}: {name} is missing. Restore it from a copy, or make the run again.")
    for name, path in found.items():
        if name in listed and name not in DOCUMENTS and sha256_file(path) != listed[name]:
            raise RunError(f"{directory}: {name} has changed since the run was written. Restore it, or run again.")


def read_record(path: Path) -> dict[str, Any]:
    """run.json of a directory, its outline checked.

    Raises:
        RunError: it is missing, no JSON, of an unknown kind, of a newer format, or lacks what every run has.
    """
    file = path / RECORD
    if path.is_file():
        raise RunError(
            f"{path}: is a file, not a run directory. Where a command takes both, the run comes first: "
            "featurecache predict RUN MANIFEST"
        )
    if not file.is_file():
        raise RunError(f"{path}: not a run directory (it holds no {RECORD})")
    try:
        record = json.loads(file.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise RunError(f"{file}: not JSON. Nothing in it was executed.") from None
    if not isinstance(record, dict) or not isinstance(record.get("schema"), int):
        raise RunError(f"{file}: not the record of a run (it has no schema number)")
    if record["schema"] > SCHEMA:
        writer = record.get("featurecache", "a newer version")
        raise RunError(
            f"{file}: has schema {record['schema']}, written by featurecache {writer}, but this version reads up to "
            f"{SCHEMA}. Upgrade featurecache."
        )
    kinds = get_args(Kind)
    if record.get("kind") not in kinds:
        raise RunError(f"{file}: unknown kind {record.get('kind')!r}. Known: {', '.join(kinds)}.")
    for name, expected in {**REQUIRED, "featurecache": str, "files": dict}.items():
        if not isinstance(record.get(name), expected):
            raise RunError(f"{file}: {name} is missing or of the wrong type")
    for name in ("recipes", "bodies"):
        if not all(isinstance(item, dict) for item in (record.get(name) or {}).values()):
            raise RunError(f"{file}: {name} must hold a table per view")
    return record


def lock_file(file: IO[bytes]) -> None:
    """An exclusive lock that ends with the process; OSError if another process has it."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync(path: Path) -> None:
    """Fsync a file, or a directory where the system allows that."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically (Linux renameat2); False where the system or the file system can't."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
