"""What is saved beside a head's own file, and the checks that both pass before a parser sees them."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from featurecache import config
from featurecache.errors import InputError, RunError

RECORD = "head.json"
SCHEMA = 1
PICKLE = "a Python pickle, which heads never are; nothing of it was executed"


class HeadRecord(config.Settings):
    """What head.json holds; `fitted` is the head's own."""

    head: str
    settings: dict[str, Any]
    task: Literal["binary", "multiclass", "multilabel", "regression", "dense"]
    classes: tuple[str, ...]
    names: tuple[str, ...]
    skipped: tuple[str, ...]
    blocks: tuple[dict[str, Any], ...]
    seed: int
    file: str
    sha256: str
    fitted: dict[str, Any] = Field(default_factory=dict)


def write_record(directory: Path, record: HeadRecord) -> None:
    """Write head.json."""
    text = json.dumps({"schema": SCHEMA, **record.model_dump(mode="json")}, indent=2, allow_nan=False)
    (directory / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(directory: Path) -> HeadRecord:
    """head.json of a directory.

    Raises:
        RunError: it is missing, not JSON, has an unknown key or a value that does not fit.
    """
    path = directory / RECORD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object")
        schema = values.pop("schema", None)
        if schema != SCHEMA:
            raise RunError(f"{path}: schema {schema!r}; this version of featurecache reads {SCHEMA}")
        return HeadRecord.create(values, source=str(path))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; {directory} holds no saved head") from None
    except InputError as error:
        raise RunError(str(error)) from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: can't be read: {first_line(error)}") from None


def check_file(path: Path, sha256: str) -> None:
    """Compare a head's file with the record before any parser sees it."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"{path}: can't be read: {error.strerror}") from None
    if found != sha256:
        why = PICKLE if is_pickle(path) else f"changed since it was written (its SHA-256 is not that in {RECORD})"
        raise RunError(f"{path}: {why}")


def is_pickle(path: Path) -> bool:
    """Whether a file looks like a pickle, or like torch.save's archive of one; nothing of it is executed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    content = path.read_bytes()
    return len(content) > 2 and content[0] == 0x80 and content[1] <= 5 and content[-1:] == b"."


def first_line(error: Exception) -> str:
    """Kind and first line of an error, for a message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
