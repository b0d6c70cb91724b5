"""Two-stage image features with cached embeddings; the public names are imported when they are first used."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurecache.api import evaluate, extract, finetune_joint, fit_head, load_run, plan_extract, predict, tune
    from featurecache.bodies.names import list_bodies
    from featurecache.bodies.shown import show_body
    from featurecache.care import compact, doctor, forget, info, prune, rm, verify
    from featurecache.dataset import FeatureDataset
    from featurecache.demo import run_demo
    from featurecache.errors import FeatureCacheError
    from featurecache.looking import ablate, compare, explain, explore, export, report, show_features
    from featurecache.pipeline.call import run_pipeline
    from featurecache.run import Run
    from featurecache.store.store import FeatureStore

_PLACES = {
    "extract": "featurecache.api",
    "plan_extract": "featurecache.api",
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
    "show_features": "featurecache.looking",
    "info": "featurecache.care",
    "verify": "featurecache.care",
    "prune": "featurecache.care",
    "rm": "featurecache.care",
    "forget": "featurecache.care",
    "compact": "featurecache.care",
    "doctor": "featurecache.care",
    "list_bodies": "featurecache.bodies.names",
    "show_body": "featurecache.bodies.shown",
    "run_pipeline": "featurecache.pipeline.call",
    "run_demo": "featurecache.demo",
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
    "compact",
    "compare",
    "doctor",
    "evaluate",
    "explain",
    "explore",
    "export",
    "extract",
    "finetune_joint",
    "fit_head",
    "forget",
    "info",
    "list_bodies",
    "load_run",
    "plan_extract",
    "predict",
    "prune",
    "report",
    "rm",
    "run_demo",
    "run_pipeline",
    "show_body",
    "show_features",
    "tune",
    "verify",
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
