"""Functions that a person names as `package.module:function`: a body's factory, a reader."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from featurecache.errors import InputError, did_you_mean


def import_named(what: str, name: str) -> Callable[..., Any]:
    """Import a function; its module is looked for in the current directory too.

    Args:
        what: it is, for errors: `body`, `reader`.
        name: `package.module:function`. The caller makes sure that a person named it.

    Raises:
        InputError: there is none.
    """
    path, _, attribute = name.partition(":")
    try:
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path.partition(".")[0] or os.getcwd() in sys.path:
                raise
            sys.path.insert(0, os.getcwd())  # a console script's path lacks it, unlike `python -m`
            module = importlib.import_module(path)
    except ImportError as error:
        raise InputError(f"{what} {name!r}: {path!r} can't be imported: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        near = did_you_mean(attribute, [item for item in dir(module) if not item.startswith("_")])
        raise InputError(f"{what} {name!r}: module {path!r} has no function {attribute!r}.{near}")
    found: Callable[..., Any] = function
    return found
