"""What is at a path: a store, something else or nothing yet; creating a store and a recipe's group."""

from __future__ import annotations

import json
import shutil
import uuid as uuids
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from featurecache.errors import CorruptionError, InputError, MissingFileError, StoreError
from featurecache.store.files import (
    file_system,
    is_network,
    move,
    publish,
    step,
    storage_errors,
    sync_directory,
    trash,
    write_file,
)
from featurecache.store.format import (
    FEATURES,
    FIRST_CAPACITY,
    FORMAT,
    Layout,
    StorePaths,
    feature_list,
    group_document,
    root_document,
    to_bytes,
)
from featurecache.store.index import Index, Meta
from featurecache.store.recipe import Recipe
from featurecache.store.schema import create_index

INCOMPLETE = "incomplete"
"""The file in a store that `compact` is still filling."""
_OWN_NAMES = {
    "features.zarr", "index.sqlite", "index.sqlite-wal", "index.sqlite-shm", "lock", "trash", "incoming", INCOMPLETE,
}  # fmt: skip


def require_store(paths: StorePaths) -> None:
    """Raise unless there is a store at the path.

    Raises:
        MissingFileError: there is nothing.
        InputError: there is something else; says what.
        StoreError: a part of the store is missing.
    """
    root = paths.root
    if not root.exists():
        raise MissingFileError(f"{root}: no such store. `featurecache extract` makes one.")
    if not root.is_dir():
        raise InputError(f"{root}: not a feature store but a file.")
    if paths.index.is_file() and paths.zarr.is_dir():
        return
    if paths.zarr.is_dir() and (_has_groups(paths) or not _unfinished(paths)):
        raise StoreError(
            f"{paths.index} is missing. `featurecache verify {root} --rebuild-index` makes it anew from the key arrays."
        )
    if paths.index.is_file():
        raise StoreError(
            f"{paths.zarr} is missing: the index alone holds no features. Restore it, or start a new store."
        )
    found = sorted(path.name for path in root.iterdir())
    if not set(found) - _OWN_NAMES:
        raise InputError(f"{root}: not a feature store yet, {'empty' if not found else 'creating it was cut off'}.")
    shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
    raise InputError(f"{root}: not a feature store: it holds {shown}, but no features.zarr and index.sqlite.")


def prepare_directory(paths: StorePaths) -> None:
    """Make the directory where a store is to be created; a directory that holds something else is refused as above."""
    if not paths.root.exists():
        with storage_errors(f"{paths.root}: creating the store failed"):
            paths.root.mkdir(parents=True, exist_ok=True)
    if paths.root.is_dir() and _unfinished(paths):
        return
    require_store(paths)


def _unfinished(paths: StorePaths) -> bool:
    """Whether the directory is empty, or holds only what is left of a creation that was cut off."""
    found = {path.name for path in paths.root.iterdir()}
    return not found - _OWN_NAMES and "index.sqlite" not in found and not _has_groups(paths)


def _has_groups(paths: StorePaths) -> bool:
    return paths.zarr.is_dir() and any(path.is_dir() for path in paths.zarr.iterdir())


def create(paths: StorePaths) -> None:
    """Make an empty store; called with the writer's lock held. Cut off at any point, it can be called again."""
    paths.incoming.mkdir(exist_ok=True)
    paths.zarr.mkdir(exist_ok=True)
    identity = str(uuids.uuid4())
    publish(paths.incoming, paths.zarr / "zarr.json", to_bytes(root_document(identity, 0, ())))
    sync_directory(paths.root)
    step("root-written")
    create_index(paths, identity, paths.incoming / "index.sqlite")
    sync_directory(paths.root.parent)
    step("index-created")


def read_root(paths: StorePaths) -> Meta:
    """The attributes of features.zarr: format, required features, uuid, generation; others are ignored.

    Raises:
        CorruptionError: zarr.json is missing or damaged.
        NewerStoreError: it was written by a newer version.
    """
    path = paths.zarr / "zarr.json"
    try:
        attributes = json.loads(path.read_bytes())["attributes"]
        format_ = int(attributes["format"])
        features = feature_list(attributes["required_features"]) if format_ == FORMAT else ()
        require_known(paths, format_, features)  # first: of a newer format no more is known
        return Meta(format_, str(attributes["uuid"]), int(attributes["generation"]), features)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptionError(
            f"{path}: missing or damaged ({error}). `featurecache verify {paths.root} --repair` writes it anew."
        ) from None


class NewerStoreError(StoreError):
    """The store was written by a newer version, in a way that this one would misread."""


def require_known(paths: StorePaths, format_: int, features: Iterable[str]) -> None:
    """Raise unless this version knows the format and everything that the store requires.

    Raises:
        NewerStoreError: it doesn't.
    """
    if format_ != FORMAT:
        raise NewerStoreError(
            f"{paths.root}: a store of format {format_}; this version reads format {FORMAT}. Update featurecache."
        )
    if unknown := sorted(set(features) - FEATURES):
        raise NewerStoreError(
            f"{paths.root}: a store of a newer featurecache: it requires {', '.join(map(repr, unknown))}, which this "
            "version doesn't know. Update featurecache."
        )


def check_identity(index: Index, paths: StorePaths) -> None:
    """Make sure that index and features belong together and that the index is not an older copy.

    Raises:
        StoreError: they don't, or a newer version wrote them; says what to do. Nothing was changed.
    """
    root = read_root(paths)  # before the index: its generation is written after that of the index
    meta = index.meta()
    require_known(paths, meta.format, meta.required_features)
    if meta.uuid != root.uuid:
        raise StoreError(
            f"{paths.root}: features.zarr and index.sqlite are of different stores "
            f"({root.uuid} and {meta.uuid}). Restore the index that belongs here, or make it "
            f"anew with `featurecache verify {paths.root} --rebuild-index`."
        )
    if root.generation > meta.generation:
        raise StoreError(
            f"{paths.index} is an older copy (generation {meta.generation}, features.zarr has {root.generation}). "
            f"Restore the newer one, or make it anew with `featurecache verify {paths.root} --rebuild-index`; "
            "no feature is lost."
        )


def warn_of_network(path: Path, *, stacklevel: int) -> None:
    """Warn where a store that is to be written lies on a file system that can't be relied on."""
    kind = file_system(path)
    if is_network(kind):
        warnings.warn(
            f"{path} is on a network file system ({kind}), where locks may not exclude a second writer and "
            "the index may be damaged. Write to a local disk, then copy.",
            stacklevel=stacklevel,
        )


def write_group(
    paths: StorePaths, recipe: Recipe, layout: Layout, canary: Mapping[str, Any] | None, recorded: Mapping[str, Any]
) -> None:
    """Publish a recipe's group with its empty arrays in one rename.

    Raises:
        StoreError: there is a group of this name that holds chunks which the index doesn't know.
    """
    target, staged = paths.zarr / recipe.id, paths.incoming / recipe.id
    if target.exists():  # a process died between this rename and the index
        if any(target.glob("*/c.*")):
            raise StoreError(
                f"{target} holds features that the index doesn't know. "
                f"`featurecache verify {paths.root} --rebuild-index` adds them."
            )
        trash(target, paths.trash)
    shutil.rmtree(staged, ignore_errors=True)
    documents = {"zarr.json": group_document(recipe, layout, canary, recorded)}
    documents |= {f"{name}/zarr.json": spec.document(FIRST_CAPACITY) for name, spec in layout.arrays().items()}
    for name, document in documents.items():
        path = staged / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, [to_bytes(document)])
        sync_directory(path.parent)
    step("group-prepared")
    move(staged, target)
    sync_directory(paths.zarr)
    step("group-published")
