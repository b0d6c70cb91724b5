"""A pipeline as its TOML file declares it: the stages' own options, strictly checked, and which stage needs which."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from featurecache.config import (
    ExtractConfig,
    FitConfig,
    JointConfig,
    ManifestConfig,
    Settings,
    SplitConfig,
    TargetConfig,
)
from featurecache.data.shipped import shipped_recipes
from featurecache.errors import InputError, MissingFileError, did_you_mean

T = TypeVar("T")
NOWHERE = Path("-")  # stands for what the pipeline puts in
RUN_PREFIX = "run:"
BESIDE = (("data", "manifest"), ("data", "root"))  # paths that a file gives relative to itself


def _listed(value: Any) -> Any:
    """One table or several."""
    return [value] if isinstance(value, Mapping) else value


Stages = Annotated[tuple[T, ...], BeforeValidator(_listed)]


class Stage(Settings):
    """What every stage has. `given` names the options of the stage's own configuration that the pipeline fills in."""

    given: ClassVar[tuple[str, ...]] = ()
    default: ClassVar[str] = ""

    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _not_given_twice(cls, data: Any) -> Any:
        for key in cls.given:
            if isinstance(data, Mapping) and key in data:
                raise ValueError(f"{key!r} is filled in by the pipeline; leave it out")
        return data

    @property
    def called(self) -> str:
        """The name by which other stages know it, and under which it is found in OUT."""
        return self.name or self.default


class DataStage(ManifestConfig, SplitConfig, TargetConfig):
    """[data]: the samples, and what all stages have in common. `maker` makes the manifest where none is given."""

    manifest: Path = NOWHERE
    maker: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    target: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.manifest == NOWHERE and self.maker is None:
            raise ValueError("no samples: give manifest = PATH, or maker = NAME for a data set that comes with it")
        return self


class ExtractStage(Stage, ExtractConfig):
    """[extract]: stage one."""

    given = ("manifest", "store", "replace")
    default = "features"

    name: str | None = None
    manifest: Path = NOWHERE
    store: Path = NOWHERE


class FitStage(Stage, FitConfig):
    """[[fit]]: a head on the features of `extract` (its name; default the first)."""

    given = ("store", "dataset", "out", "overwrite", "manifest")

    store: Path = NOWHERE
    dataset: str = ""
    target: tuple[str, ...] = ()
    extract: str | None = None

    @property
    def called(self) -> str:
        """By default as its head."""
        return self.name or self.head


class TuneStage(FitStage):
    """[[tune]]: a search over a head's settings."""

    trials: int = 20
    metric: str | None = None

    @property
    def called(self) -> str:
        """By default after its head."""
        return self.name or f"tuned-{self.head}"


class JointStage(Stage, JointConfig):
    """[[joint]]: bodies and head as one network; `init` names the fit to start from."""

    given = ("manifest", "out", "overwrite", "resume", "store")
    default = "joint"

    manifest: Path = NOWHERE
    target: tuple[str, ...] = ()


class AblateStage(FitStage):
    """[ablate]: whether joining views helps, for several heads; `settings` by head."""

    default = "ablation"

    head: str = "logistic"
    heads: tuple[str, ...] = ("logistic",)
    seeds: int = 5
    metric: str | None = None

    @property
    def called(self) -> str:
        """Its name."""
        return self.name or self.default


class CompareStage(Stage):
    """[compare]: runs of the same samples beside each other; default all of the pipeline."""

    default = "comparison"

    runs: tuple[str, ...] = ()
    metric: str | None = None
    bootstrap: int = 1000
    seed: int = 0


class ClassifyStage(Stage):
    """[classify]: a body with its own classifier: the likeliest classes of some images of the data."""

    default = "classes"

    body: str = "torchvision/squeezenet1_1"
    weights: str = "DEFAULT"
    view: str | None = None
    images: int = 8
    top: int = 5
    device: str = "auto"


KINDS = ("classify", "extract", "fit", "tune", "joint", "ablate", "compare")
RUNS = ("fit", "tune", "joint")


class PipelineConfig(Settings):
    """A whole pipeline; `variants` are sets of changes by dotted key, for `--variant NAME`."""

    title: str = ""
    data: DataStage
    classify: Stages[ClassifyStage] = ()
    extract: Stages[ExtractStage] = ()
    fit: Stages[FitStage] = ()
    tune: Stages[TuneStage] = ()
    joint: Stages[JointStage] = ()
    ablate: Stages[AblateStage] = ()
    compare: Stages[CompareStage] = ()
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _references(self) -> Self:
        known: dict[str, str] = {}
        for kind, stage in self.stages():
            if stage.called in known:
                raise ValueError(f"two stages are called {stage.called!r}: give each a name = ... of its own")
            known[stage.called] = kind
        for kind, stage in self.stages():
            for key, name, wanted in references(kind, stage):
                right = [other for other, what in known.items() if what in wanted]
                if name not in right:
                    kinds = " or ".join(wanted)
                    there = f" There are: {', '.join(right)}." if right else f" There is no [{wanted[0]}]."
                    raise ValueError(
                        f"{kind} {stage.called!r}: {key} = {name!r} is no {kinds} stage."
                        f"{did_you_mean(name, right)}{there}"
                    )
            if kind in ("fit", "tune", "ablate") and not self.extract:
                raise ValueError(f"{kind} {stage.called!r}: there is no [extract] whose features it could take")
        return self

    def stages(self) -> Iterator[tuple[str, Any]]:
        """(kind, stage) of every stage, in the order of the kinds."""
        for kind in KINDS:
            for stage in getattr(self, kind):
                yield kind, stage

    def needs(self, kind: str, stage: Any) -> list[str]:
        """The names of the stages that must be done before."""
        found = [name for _, name, _ in references(kind, stage)]
        if kind in ("fit", "tune", "ablate") and stage.extract is None:
            found.append(self.extract[0].called)
        if kind == "compare" and not stage.runs:
            found += [other.called for what, other in self.stages() if what in RUNS]
        return found

    def ordered(self) -> list[tuple[str, Any]]:
        """The stages, each behind those that it needs.

        Raises:
            InputError: they need each other in a circle.
        """
        waiting, done, ready = list(self.stages()), set[str](), list[tuple[str, Any]]()
        while waiting:
            free = next((item for item in waiting if set(self.needs(*item)) <= done), None)
            if free is None:
                raise InputError(f"stages that need each other: {', '.join(stage.called for _, stage in waiting)}")
            waiting.remove(free)
            done.add(free[1].called)
            ready.append(free)
        return ready


def references(kind: str, stage: Any) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(key, name, kinds that it may be of) of every other stage that a stage names."""
    if kind in ("fit", "tune", "ablate") and stage.extract is not None:
        yield "extract", stage.extract, ("extract",)
    if kind == "joint" and stage.init is not None:
        yield "init", str(stage.init), ("fit",)
    if kind in ("extract", "joint"):
        for name in stage.body.values():
            if name.startswith(RUN_PREFIX) and "/" not in name:
                yield "body", name.removeprefix(RUN_PREFIX), ("joint",)
    if kind == "compare":
        for name in stage.runs:
            yield "runs", name, RUNS


def find_pipeline(given: Path) -> Path:
    """The file itself, or where there is none the shipped recipe of that name.

    Raises:
        MissingFileError: neither; it names the nearest recipe.
    """
    if given.is_file():
        return given
    recipes = shipped_recipes()
    if given.parent == Path() and given.stem in recipes and given.suffix in ("", ".toml"):
        return recipes[given.stem]
    raise MissingFileError(
        f"{given}: no such file, and no recipe of that name.{did_you_mean(given.stem, recipes)} "
        f"Recipes: {', '.join(recipes) or 'none'}."
    )


def read_pipeline(path: Path, changes: Mapping[str, Any] | None = None, variant: str | None = None) -> PipelineConfig:
    """Read, change and check a pipeline file.

    Args:
        path: of the TOML file, or the name of a shipped recipe.
        changes: dotted key -> value, as `--set` gives them: `extract.image_size`. Where a key leads through several
            stages of a kind, the next part is a stage's name, or all of them are meant.
        variant: a name of [variants]; its changes come first.

    Raises:
        MissingFileError: there is no such file, and no recipe of that name.
        InputError: everything that is wrong with it, each with its key.
    """
    path = find_pipeline(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    for section, key in BESIDE:
        table = values.get(section)
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = str(path.parent / table[key])
    if variant is not None:
        variants = values.get("variants", {})
        if variant not in variants:
            known = ", ".join(variants) or "none"
            raise InputError(f"{path}: no variant {variant!r}.{did_you_mean(variant, variants)} It has: {known}.")
        changes = {**variants[variant], **(changes or {})}
    for key, value in (changes or {}).items():
        change(values, key.split("."), value, key)
    config = PipelineConfig.create(values, source=str(path))
    config.ordered()
    return config


def change(values: Any, parts: Sequence[str], value: Any, key: str) -> None:
    """Set one dotted key in nested tables.

    Raises:
        InputError: it leads into something that is no table.
    """
    head, *rest = parts
    if isinstance(values, list):
        named = [item for item in values if isinstance(item, dict) and head in (item.get("name"), item.get("head"))]
        for item in named or values:
            change(item, rest if named else parts, value, key)
        return
    if not isinstance(values, dict) or (not rest and not head):
        raise InputError(f"--set {key}: {head!r} is not in a table")
    if not rest:
        values[head] = copy.deepcopy(value)
        return
    if isinstance(values.get(head), str | int | float) or not isinstance(values.get(head, {}), dict | list):
        values[head] = {"*": values[head]}  # an option that was given once for all views
    change(values.setdefault(head, {}), rest, value, key)
