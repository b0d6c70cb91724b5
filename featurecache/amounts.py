"""Numbers as a person reads them in a line of text."""

from __future__ import annotations


def counted(n: int, word: str) -> str:
    """`1 file`, `1,200 files`."""
    return f"{n:,} {word}" + ("" if n == 1 else "s")


def human_bytes(count: float) -> str:
    """`12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
