"""How views are joined into one feature vector, by name: a file each; a new one is added to the tuple below."""

from __future__ import annotations

from featurecache.errors import InputError, did_you_mean
from featurecache.fusion.base import Fusion, drop_views
from featurecache.fusion.concat import Concat
from featurecache.fusion.gated import Gated
from featurecache.fusion.pair import DifferenceProduct
from featurecache.fusion.pooled import Max, Mean
from featurecache.fusion.spatial import Spatial

__all__ = ["Concat", "Fusion", "drop_views", "fusion_names", "get_fusion"]

_FUSIONS: dict[str, type[Fusion]] = {
    fusion.name: fusion for fusion in (Concat, Mean, Max, Gated, Spatial, DifferenceProduct)
}


def fusion_names() -> tuple[str, ...]:
    """The names that `get_fusion` knows."""
    return tuple(_FUSIONS)


def get_fusion(name: str) -> type[Fusion]:
    """The fusion of that name.

    Raises:
        InputError: there is none; names the nearest.
    """
    if name not in _FUSIONS:
        raise InputError(f"unknown fusion {name!r}.{did_you_mean(name, _FUSIONS)} Known: {', '.join(fusion_names())}.")
    return _FUSIONS[name]
