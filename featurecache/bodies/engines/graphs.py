"""Converted graphs in the user's cache directory: found by what they depend on, checked by hash, bounded in size.

Nothing here is needed: what is missing, damaged or can't be written is converted again. The features' own store never
holds a graph.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = "FEATURECACHE_CACHE"
LIMIT = 2 << 30  # bytes that all graphs together may take; beyond it those unused for longest go
GRAPH, RECORD = "graph.xml", "graph.json"


def graphs_folder() -> Path:
    """`$FEATURECACHE_CACHE/graphs`, else `featurecache/graphs` where the platform keeps what can be made again."""
    given = os.environ.get(ENVIRONMENT)
    if given:
        return Path(given) / "graphs"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)) / "featurecache" / "graphs"


def find_graph(key: str) -> Path | str | None:
    """The graph that was kept under a key; the reason, where it was found that there can be none; else None.

    What was damaged is removed.
    """
    entry = graphs_folder() / key
    try:
        record = json.loads((entry / RECORD).read_text(encoding="utf-8"))
        failure, hashes = record["failure"], record["files"]
        sound = all(_sha256(entry / name) == digest for name, digest in hashes.items())
        if sound and record["key"] == key and (failure or GRAPH in hashes):
            with contextlib.suppress(OSError):
                os.utime(entry)  # used now: `prune` takes the others first
            return str(failure) or entry / GRAPH
    except FileNotFoundError:
        if not entry.exists():
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    shutil.rmtree(entry, ignore_errors=True)
    return None


def keep_graph(key: str, write: Callable[[Path], None]) -> Path | None:
    """Keep the files that `write` puts into a folder, `graph.xml` among them; all of them or none.

    Returns:
        The graph; None where the cache can't be written (a read-only home, a full disk).
    """
    return _publish(key, write, "")


def keep_failure(key: str, reason: str) -> None:
    """Remember that there can be no graph of this key, and why."""
    _publish(key, lambda folder: None, reason)


def _publish(key: str, write: Callable[[Path], None], failure: str) -> Path | None:
    root = graphs_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=root))
    except OSError:
        return None
    try:
        write(staging)
        files = {path.name: _sha256(path) for path in sorted(staging.iterdir())}
        record = {"key": key, "failure": failure, "files": files}
        (staging / RECORD).write_text(json.dumps(record), encoding="utf-8")
        with contextlib.suppress(OSError):  # another process was faster: its entry is as good
            os.rename(staging, root / key)
    except OSError:
        return None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    prune(root, keep=key)
    found = find_graph(key)
    return found if isinstance(found, Path) else None


def prune(root: Path, *, keep: str = "", limit: int | None = None) -> None:
    """Remove the graphs unused for longest until the rest fits; never the one named `keep`."""
    entries = []
    with contextlib.suppress(OSError):
        for entry in root.iterdir():
            with contextlib.suppress(OSError):
                size = sum(path.stat().st_size for path in entry.iterdir())
                entries.append((entry.name == keep, entry.stat().st_mtime_ns, size, entry))
    total = 0
    for kept, _, size, entry in sorted(entries, reverse=True):
        total += size
        if total > (LIMIT if limit is None else limit) and not kept:
            shutil.rmtree(entry, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
