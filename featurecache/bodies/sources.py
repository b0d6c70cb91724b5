"""Whose code a network is made of: which Python modules are the user's own, and the digests of their text."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.machinery
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterable
from pathlib import Path

from torch import nn

LIBRARIES = frozenset({"torch", "torchvision", "timm", "builtins", "featurecache"})


def is_foreign(module: str) -> bool:
    """Whether code of this (Python) module is not that of torch, torchvision, timm, featurecache or Python itself."""
    top = module.partition(".")[0]
    return top not in LIBRARIES and not (top in sys.stdlib_module_names and _is_standard(top))


@functools.cache
def _is_standard(top: str) -> bool:
    """Whether this name is that of the standard library here, not of a user's file that hides it."""
    file = getattr(sys.modules.get(top), "__file__", None)
    return file is None or not _is_own(top)


def foreign_modules(module: nn.Module) -> set[str]:
    """Python modules that define the foreign classes of a network, their bases included."""
    return {
        base.__module__ for child in module.modules() for base in type(child).__mro__ if is_foreign(base.__module__)
    }


def sources(names: Iterable[str], packages: Iterable[str] = ()) -> dict[str, str]:
    """SHA-256 of the text of Python modules, and of those that they import in turn, if these are the user's own.

    What is installed (site-packages, the standard library) is not followed, so that installing a package changes
    nothing, but for `packages`. Where a file lies does not count, its text does.

    Args:
        names: dotted names of modules.
        packages: top-level packages whose modules are followed wherever they are: the plug-in's own.
    """
    packages = {name.partition(".")[0] for name in packages}
    found: dict[str, str] = {}
    waiting = sorted(set(names))
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        text = module_text(name)
        found[name] = hashlib.sha256(text).hexdigest()
        for used in sorted(_imported(name, text) | _loaded(name)):
            top = used.partition(".")[0]
            if used not in found and is_foreign(used) and (top in packages or _is_own(top)) and _exists(used):
                waiting.append(used)
    return dict(sorted(found.items()))


def _imported(name: str, text: bytes) -> set[str]:
    """What the import statements of a module name, its functions' too: modules, and perhaps things in them."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # compiled code
        return set()
    spec = _spec(name)
    package = name if spec is not None and spec.submodule_search_locations is not None else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found - {""}


def _loaded(name: str) -> set[str]:
    """Modules of what a loaded module holds; its submodules don't count, which anybody's import puts there."""
    found = set()
    for key, value in list(vars(sys.modules[name]).items()) if name in sys.modules else []:
        used = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        if isinstance(used, str) and used != f"{name}.{key}":
            found.add(used)
    return found


def _exists(name: str) -> bool:
    return name in sys.modules or _spec(name) is not None


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module is, whether it is loaded or not; nothing is imported to find out."""
    spec, path = None, None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        inner = ".".join(parts[:end])
        if inner in sys.modules:
            spec = getattr(sys.modules[inner], "__spec__", None)
        else:
            spec = importlib.machinery.PathFinder.find_spec(inner, path)
        path = spec.submodule_search_locations if spec is not None else None
        if path is None and end < len(parts):
            return None
    return spec


def _file(name: str) -> Path | None:
    spec = _spec(name)
    for file in (getattr(sys.modules.get(name), "__file__", None), spec.origin if spec is not None else None):
        if isinstance(file, str) and Path(file).is_file():
            return Path(file)
    return None


def module_text(name: str) -> bytes:
    """Content of a module's file; b"" where there is none (a notebook, a console)."""
    file = _file(name)
    if file is not None:
        return file.read_bytes().replace(b"\r\n", b"\n")
    try:
        return inspect.getsource(sys.modules[name]).encode()  # in a zip archive
    except (KeyError, OSError, TypeError):
        return b""


def _is_own(name: str) -> bool:
    """Whether a top-level module or package is neither installed nor Python's own."""
    spec = _spec(name)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    file = _file(name) or (Path(places[0]) if places else None)
    if file is None:
        return False
    path = file.resolve()
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    installed = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    return not any(path.is_relative_to(Path(place).resolve()) for place in installed if place)
