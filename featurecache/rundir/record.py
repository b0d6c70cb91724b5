"""Turns what a run wants to remember into plain JSON: no NaN, and no path that says whose machine it was."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from pydantic import BaseModel

# An absolute path (POSIX, home, Windows), alone or behind NAME=, VIEW=run: and the like; `https://` is none.
_ABSOLUTE = re.compile(r"(?:^|(?<=[=:,]))(?:/(?!/)|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\).*$", re.DOTALL)
_CALL = re.compile(r"featurecache\.\w+\(")
LIBRARIES = ("torch", "torchvision", "timm", "openvino", "scikit-learn", "xgboost", "numpy", "zarr", "pillow", "polars")


def portable_path(path: str | PurePath, base: Path) -> str:
    """A path as it may leave this machine.

    Args:
        path: any path. A relative one stays as it is.
        base: the directory that a run lies in.

    Returns:
        The path relative to `base` where it lies below it or below its parent (`../cache`), else its last name alone.
    """
    text = os.fspath(path)
    if _ABSOLUTE.match(text) is None:
        return PurePath(text).as_posix()
    full, base = Path(os.path.abspath(os.path.expanduser(text))), Path(os.path.abspath(base))
    for root, prefix in ((base, PurePath()), (base.parent, PurePath(".."))):
        if os.path.isabs(os.path.expanduser(text)) and root != Path(root.anchor) and full.is_relative_to(root):
            return (prefix / full.relative_to(root)).as_posix()
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1] or "/"


def locate_bodies(options: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Recorded options of bodies, with paths that `portable_path` made relative to `base` as they can be opened now.

    A path that does not lie there is left as it is: it may be relative to the current directory, or a name of another
    kind. What lay elsewhere is known by its last name only, and may have to be named anew.
    """
    result = dict(options)
    for option, prefix in (("weights", ""), ("body", "run:")):
        if not isinstance(result.get(option), Mapping):
            continue
        values = dict(result[option])
        for view, value in values.items():
            path = base / value.removeprefix(prefix)
            if value.startswith(prefix) and (path.is_dir() if prefix else path.is_file()):
                values[view] = f"{prefix}{path}"
        result[option] = values
    return result


def _portable_text(text: str, base: Path) -> str:
    return _ABSOLUTE.sub(lambda found: portable_path(found.group(), base), text)


def portable_command(command: str | Sequence[str], base: Path) -> str:
    """A command line on one line, its absolute paths made relative to `base` or cut to their last name.

    A call from Python, `featurecache.fit_head(...)`, stays as it is: it was told without such paths.
    """
    if isinstance(command, str) and _CALL.match(command):
        return command
    try:
        words = shlex.split(command) if isinstance(command, str) else list(command)
    except ValueError:  # an unclosed quote: keep it readable, it is only shown
        words = str(command).split()
    return shlex.join(_portable_text(word, base) for word in words)


def plain(value: Any, base: Path, *, text_paths: bool = False) -> Any:
    """`value` as JSON can hold it.

    NaN and infinities become None, numpy scalars and arrays numbers and lists, settings dicts, paths `portable_path`.

    Args:
        value: anything made of mappings, sequences, numbers, text, paths and settings models.
        base: what paths are made relative to.
        text_paths: whether absolute paths inside text are made portable too.

    Raises:
        TypeError: something that has no JSON form.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _portable_text(value, base) if text_paths else str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return portable_path(value, base)
    if isinstance(value, BaseModel):
        return plain(value.model_dump(), base, text_paths=text_paths)
    if isinstance(value, Mapping):
        return {str(name): plain(item, base, text_paths=text_paths) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), base, text_paths=text_paths)
    if isinstance(value, Sequence | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [plain(item, base, text_paths=text_paths) for item in items]
    raise TypeError(f"{type(value).__name__} can't be written as JSON: {value!r}")


def plain_record(record: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """A run's record as plain JSON; the command, `config` and every `*_config` lose their absolute paths."""
    # Only settings are searched for paths: elsewhere a leading slash may belong to a class or column name.
    result = {name: plain(value, base, text_paths=name.endswith("config")) for name, value in record.items()}
    if record.get("command"):
        result["command"] = portable_command(record["command"], base)
    return result


def dump_json(value: Any) -> str:
    """Indented JSON with a final newline; a NaN that slipped through is an error, not invalid JSON."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def versions() -> dict[str, str]:
    """Python, platform and the installed libraries that results may depend on; no host name."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}".strip()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def package_version() -> str:
    """The version of featurecache: that of the checkout which it runs from, else of the installed package.

    A checkout comes first since it may be newer than what was once installed from it in editable mode.
    """
    with suppress(OSError, ValueError, KeyError):
        project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text("utf-8"))["project"]
        if project["name"] == "featurecache":
            return str(project["version"])
    try:
        return version("featurecache")
    except PackageNotFoundError:  # copied somewhere without its metadata
        return "0+unknown"
