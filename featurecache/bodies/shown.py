"""What can be tapped in a body that is named: its modules, with the shape of what each gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featurecache.bodies.registry import RUN_PREFIX, load_body, load_run_body
from featurecache.bodies.taps import ModuleInfo, describe


@dataclass(frozen=True)
class BodyShown:
    """The modules of a body.

    Attributes:
        name: of the body.
        image_size: height and width in pixels for which the shapes hold.
        channels: of its input.
        modules: in the order in which they run, after `penultimate`; those that never run come last.
    """

    name: str
    image_size: tuple[int, int]
    channels: int
    modules: list[ModuleInfo]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        taps = [{**info._asdict(), "shape": list(info.shape) if info.shape else None} for info in self.modules]
        return {"body": self.name, "image_size": list(self.image_size), "taps": taps}

    def lines(self) -> list[str]:
        """As a person reads it."""
        height, width = self.image_size
        lines = [f"{self.name} at {height} x {width}, {self.channels} channels"]
        longest = max(len(info.name) for info in self.modules)
        for info in self.modules:
            shape = " x ".join(map(str, info.shape)) if info.shape else "-"
            marks = ["penultimate"] if info.penultimate else []
            marks += [f"runs {info.calls} times: NAME#0 ... NAME#{info.calls - 1}"] if info.calls > 1 else []
            lines.append(f"{info.name:<{longest}}  {info.type:<22} {shape:<18} {', '.join(marks)}".rstrip())
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


def show_body(
    name: str,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    view: str | None = None,
    trust_factory: Sequence[str] = (),
) -> BodyShown:
    """The modules of a body, any of which can be a tap. Nothing is downloaded: shapes don't depend on weights.

    Args:
        name: `torchvision/NAME`, `timm/NAME`, `package.module:factory` or `run:DIR`.
        image_size: of a square input; default what its weights expect.
        channels: of the input.
        view: which body of a run.
        trust_factory: plug-in bodies that a run may name.

    Raises:
        InputError: no such body; names the nearest.
    """
    if name.startswith(RUN_PREFIX):
        body = load_run_body(Path(name.removeprefix(RUN_PREFIX)), view, trust=trust_factory)
    else:
        body = load_body(name, "none", seed=0, channels=channels)
    size = (image_size, image_size) if image_size else body.preprocessing.size() or (224, 224)
    return BodyShown(name, size, body.preprocessing.channels, describe(body, size))
