"""Names of the bodies that can be loaded; torchvision's and timm's are read from their source, importing neither."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path

from featurecache.errors import DependencyError

ENTRY_POINTS = "featurecache.bodies"
NO_TIMM = "bodies timm/... need timm: pip install 'featurecache[timm]'"
# Both libraries register the function that builds a network with a decorator of this name, other decorators below it.
_REGISTERED = re.compile(
    r'^@register_model\b(?:\(\s*(?:name="(\w+)")?\s*\))?$.*?^def (\w+)\(', re.MULTILINE | re.DOTALL
)


def torchvision_names() -> list[str]:
    """Torchvision's classification models."""
    return sorted(_registered("torchvision")) or _imported_torchvision()


def timm_names() -> list[str]:
    """Timm's models, in its order.

    Raises:
        DependencyError: timm is not installed.
    """
    if sys.modules.get("timm") is not None:  # more may have been registered since
        return _imported_timm()
    if importlib.util.find_spec("timm") is None:
        raise DependencyError(NO_TIMM)
    return sorted(_registered("timm"), key=_natural) or _imported_timm()


def factory_names() -> list[str]:
    """Factories that installed packages register under the entry point `featurecache.bodies`."""
    return sorted(entry.value for entry in importlib.metadata.entry_points(group=ENTRY_POINTS))


def list_bodies(word: str = "") -> list[str]:
    """Bodies whose names contain `word` in any case: torchvision's, timm's where installed, registered factories."""
    names = [f"torchvision/{name}" for name in torchvision_names()]
    try:
        names += [f"timm/{name}" for name in timm_names()]
    except DependencyError:
        pass  # an extra: without it the list is torchvision's alone
    return [name for name in (*names, *factory_names()) if word.lower() in name.lower()]


@cache
def _registered(package: str) -> frozenset[str]:
    """What the source files of a package's `models` register; empty where they are not there as text."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    files = [file for place in places or () for file in sorted(Path(place, "models").glob("*.py"))]
    return frozenset(
        given or function for file in files for given, function in _REGISTERED.findall(file.read_text(encoding="utf-8"))
    )


def _natural(name: str) -> list[int | str]:
    """Sorts as people do: resnet9 before resnet10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def _imported_torchvision() -> list[str]:
    from featurecache.machine.lean import torchvision

    return [str(name) for name in torchvision.models.list_models(module=torchvision.models)]


def _imported_timm() -> list[str]:
    import timm

    return [str(name) for name in timm.list_models()]
