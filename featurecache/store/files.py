"""File operations of the commit protocol: write, then rename, all fsynced; each step can be interrupted by a test."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featurecache.errors import StoreError

STEPS = (
    "root-written", "index-created",  # a new store
    "lock-taken", "leftovers-trashed",  # opening for writing
    "group-prepared", "group-published", "recipe-indexed",  # a new recipe
    "shape-grown", "chunk-written", "chunks-synced", "rows-inserted", "rows-committed",  # a commit
    "superseded-trashed", "generation-published",
)  # fmt: skip
"""The named steps of writing, in order; `step` is called when each is done."""

MAINTENANCE_STEPS = (
    "chunk-written", "chunks-synced", "rows-dropped", "dropped-chunks-deleted",  # rows; a rewritten chunk at a time
    "records-dropped", "failures-listed", "binding-rewritten",  # what else names them
    "recipe-dropped", "group-trashed",  # a whole recipe
    "index-scrubbed", "generation-published",
)  # fmt: skip
"""The named steps of dropping, in order."""

hook: Callable[[str], None] | None = None
"""Called with the name of each step done and, as `io:write`, `io:fsync`, `io:rename`, before each file operation.

Only tests set it: to kill the process there, or to raise an OSError.
"""


def step(name: str) -> None:
    """Say that a named step is done."""
    if hook is not None:
        hook(name)


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn an OSError into a StoreError that says what was being done and that nothing committed was touched."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{what}: {error.strerror or error}. What was committed before is intact; "
            "when the cause is removed, the same command goes on from there."
        ) from error


def write_file(path: Path, parts: Iterable[Any]) -> None:
    """Write the parts (bytes or contiguous arrays) to a new file and fsync it."""
    step("io:write")
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        step("io:fsync")
        os.fsync(file.fileno())


def move(source: Path, target: Path) -> None:
    """Rename within the store, replacing the target."""
    step("io:rename")
    os.replace(source, target)


def sync_directory(path: Path) -> None:
    """Make renames within a directory durable; Windows has no such call and does without."""
    if sys.platform == "win32":
        return
    step("io:fsync")
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(staging: Path, target: Path, data: bytes) -> None:
    """Replace the file `target` by `data` in one step: readers see the old or the new file, never a part."""
    staged = staging / f"{target.parent.name}.{target.name}"
    write_file(staged, [data])
    move(staged, target)
    sync_directory(target.parent)


def trash(path: Path, bin_: Path) -> Path:
    """Move a file or directory of the store into its trash, under a name that is free there."""
    bin_.mkdir(exist_ok=True)
    stem, number = f"{path.parent.parent.name}.{path.parent.name}.{path.name}", 0
    while (target := bin_ / f"{stem}.{number}").exists():
        number += 1
    move(path, target)
    return target


def file_system(path: Path) -> str:
    """Type of the file system that holds `path` (`ext4`, `nfs4`, ...), '' where the platform doesn't say."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    resolved, best, kind = path.resolve(), -1, ""
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount = Path(fields[1].replace("\\040", " "))
        if (resolved == mount or mount in resolved.parents) and len(mount.parts) >= best:
            best, kind = len(mount.parts), fields[2]
    return kind


_NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "9p",
    "afs",
    "ceph",
    "lustre",
    "glusterfs",
    "gpfs",
    "beegfs",
    "fuse.sshfs",
    "fuse.s3fs",
)
_NO_CHANGE_TIME = ("vfat", "exfat", "msdos", "fuse.", "ntfs", "9p")


def is_network(kind: str) -> bool:
    """Whether a file system type is one where locks and SQLite can't be relied on."""
    return kind.startswith(_NETWORK)


def has_change_time(path: Path) -> bool:
    """Whether st_ctime changes with every change of a file there; where it doesn't, `--check stat` must read.

    False on Windows (creation time), on FAT-like and on network file systems.
    """
    if sys.platform == "win32":
        return False
    kind = file_system(path)
    return not (kind.startswith(_NO_CHANGE_TIME) or is_network(kind))
