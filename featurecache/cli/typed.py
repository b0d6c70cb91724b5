"""What a value means that a person typed on a command line."""

from __future__ import annotations

import tomllib
from typing import Any


def toml_value(text: str) -> Any:
    """A number, true or false, a list or table, as TOML writes them, else the text itself.

    `A,B` of values that TOML knows is a list: `40,400`.
    """
    for written in (text, f"[{text}]") if "," in text else (text,):
        try:
            return tomllib.loads(f"value = {written}")["value"]
        except tomllib.TOMLDecodeError:
            continue
    return text
