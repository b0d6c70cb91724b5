"""Two-stage image features with cached embeddings; the public names are imported when they are first used."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurecache.api import evaluate, extract, finetune_joint, fit_head, load_run, predict, tune
    from featurecache.dataset import FeatureDataset
    from featurecache.errors import FeatureCacheError
    from featurecache.looking import ablate, compare, explain, explore, export, report
    from featurecache.run import Run
    from featurecache.store.store import FeatureStore

_PLACES = {
    "extract": "featurecache.api",
    "fit_head": "featurecache.api",
    "finetune_joint": "featurecache.api",
    "tune": "featurecache.api",
    "predict": "featurecache.api",
    "evaluate": "featurecache.api",
    "compare": "featurecache.looking",
    "ablate": "featurecache.looking",
    "report": "featurecache.looking",
    "explain": "featurecache.looking",
    "explore": "featurecache.looking",
    "export": "featurecache.looking",
    "FeatureDataset": "featurecache.dataset",
    "FeatureCacheError": "featurecache.errors",
    "FeatureStore": "featurecache.store.store",
    "Run": "featurecache.run",
    "load_run": "featurecache.api",
}

__all__ = [
    "FeatureCacheError",
    "FeatureDataset",
    "FeatureStore",
    "Run",
    "ablate",
    "compare",
    "evaluate",
    "explain",
    "explore",
    "export",
    "extract",
    "finetune_joint",
    "fit_head",
    "load_run",
    "predict",
    "report",
    "tune",
]


class _Package(ModuleType):
    """Keeps `featurecache.extract` the function although there is a module of that name, whatever is imported first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'featurecache' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
