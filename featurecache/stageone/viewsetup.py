"""What the features of one view depend on: body, reader, preprocessing and taps, resolved from the configuration."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featurecache.bodies.engines import ConversionError, fast_precision, load_graph, resolve_device, resolve_engine
from featurecache.bodies.identity import Identity, identify
from featurecache.bodies.registry import Body, load_body, load_run_body
from featurecache.bodies.taps import ResolvedTap, Tapped, resolve_taps
from featurecache.config import ANY_VIEW, AUTO, BodyConfig, ExtractConfig, ManifestConfig, Tap, for_view
from featurecache.data.readers import get_reader
from featurecache.data.readers.base import Reader
from featurecache.data.transforms import Preprocessing
from featurecache.errors import DependencyError, InputError
from featurecache.stageone.replicas import augmentation
from featurecache.store.format import StorePaths
from featurecache.store.recipe import Recipe
from featurecache.store.store import FeatureStore

RUN_PREFIX = "run:"


@dataclass(frozen=True, eq=False)
class ViewSetup:
    """One view, ready to run: what it reads, what runs over it and what is kept."""

    view: str
    body: Body
    reader: Reader
    preprocessing: Preprocessing
    size: tuple[int, int]
    taps: tuple[ResolvedTap, ...]
    identities: tuple[Identity, ...]  # of each tap

    def recipe(self, *, engine: str, precision: str, storage_dtype: str) -> Recipe:
        """The recipe of this view's features, as computed by `engine` in `precision` and stored as `storage_dtype`."""
        fields: dict[str, Any] = {
            "schema": 1,
            "reader": {
                "name": self.reader.name,
                "version": self.reader.version,
                "parameters": self.reader.parameters(),
            },
            "preprocessing": self.preprocessing.parameters(),
            "body": {"architecture": self.body.architecture},
            "engine": engine,
            "precision": precision,
            "storage_dtype": storage_dtype,
        }
        # Weights and program belong to each tap, which depends on no other: so `base` is the same for all taps of a
        # body, and a tap is found in any recipe that holds it, whatever else that one holds.
        taps = zip(self.taps, self.identities, strict=True)
        return Recipe(fields, tuple({**tap.parameters_for_recipe(), **own._asdict()} for tap, own in taps))

    def tapped(self) -> Tapped:
        """The body with its taps, as one module."""
        return Tapped(self.body, self.taps)


def check_options(config: ExtractConfig) -> None:
    """Refuse at once what could not end well, before anything is read or written.

    Raises:
        InputError: names the option.
        DependencyError: openvino was asked for and is not installed.
    """
    for name in ("batch_size", "workers", "rows_per_chunk"):
        value = getattr(config, name)
        if isinstance(value, int) and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if config.replicas < 0:
        raise InputError(f"--replicas {config.replicas}: 0 for none, or how many of each image")
    if config.augment and not config.replicas:
        raise InputError("--augment is for replicas: say how many with --replicas K")
    augmentation(config.augment)
    if any(mark in (config.name or "") for mark in "/\\\0\n"):
        raise InputError(f"--name {config.name!r}: the name of a dataset holds no slashes and no line ends")
    resolve_device(config.device)
    if not StorePaths(config.store).index.exists():  # what a store holds can be reused where it could not be computed
        resolve_engine("openvino" if config.engine == "openvino" else "torch", config.precision, config.device)


def load_view_body(config: BodyConfig, view: str, *, seed: int | None) -> Body:
    """The body that the configuration names for a view, with its weights and input channels."""
    name = for_view(config.body, view, "torchvision/densenet121")
    if name.startswith(RUN_PREFIX):
        return load_run_body(Path(name.removeprefix(RUN_PREFIX)), view, trust=config.trust_factory)
    weights = for_view(config.weights, view, "DEFAULT")
    return load_body(name, weights, seed=seed, channels=config.channels.get(view, config.channels.get(ANY_VIEW)))


def view_preprocessing(config: BodyConfig, view: str, body: Body, *, nearest: bool = False) -> Preprocessing:
    """The body's own preprocessing, changed where the configuration says so.

    Args:
        config: the options.
        view: which view.
        body: with the preprocessing that its weights expect.
        nearest: whether images are resized without mixing pixels unless said otherwise, as masks must be.

    Raises:
        InputError: the options contradict each other, or leave images of different sizes.
    """
    changes: dict[str, Any] = {"interpolation": "nearest"} if nearest else {}
    for field in ("resize", "crop", "resize_mode", "interpolation", "antialias", "mean", "std"):
        value = for_view(getattr(config, field), view, None)
        if value is not None:
            changes[field] = None if value == "none" else value
    size = config.image_size.get(view, config.image_size.get(ANY_VIEW))
    if size is not None:
        for field in ("resize", "crop"):
            if changes.setdefault(field, size) != size:
                raise InputError(
                    f"view {view!r}: --image-size {size} is short for --resize {size} --crop {size}, but "
                    f"--{field} {changes[field] or 'none'} is given too. Give either."
                )
    preprocessing = replace(body.preprocessing, **changes)
    resized, crop = preprocessing.resize, preprocessing.crop
    own = not changes.keys() & {"resize", "crop"}
    if not own and preprocessing.resize_mode == "crop" and resized and crop and crop > resized:
        raise InputError(
            f"view {view!r}: with resize={resized} and crop={crop} every image would get a black border. "
            f"Give --crop {resized} or less, or --resize {crop} or more."
        )
    if preprocessing.size() is None:
        raise InputError(
            f"view {view!r}: with resize={preprocessing.resize}, crop={preprocessing.crop} and "
            f"resize-mode={preprocessing.resize_mode} images keep different sizes and can't share a batch. "
            "Give --crop N, or --resize N with --resize-mode squash or pad."
        )
    return preprocessing


def reader_name(config: ManifestConfig, view: str) -> str:
    """The reader of a view. Where no manifest has decided yet (see `with_readers`), images are what is read."""
    name = for_view(config.reader, view, AUTO)
    return "image" if name == AUTO else name


def view_reader(config: Any, view: str, body: Body) -> Reader:
    """The reader of a view, asked for as many channels (a text: places) as the body takes."""
    name = reader_name(config, view)
    count = "length" if name == "text" else "channels"
    parameters: dict[str, Any] = {count: body.preprocessing.channels}
    if name == "image":
        parameters["exif"] = for_view(config.exif, view, True)
    own = {**config.reader_settings.get(ANY_VIEW, {}), **config.reader_settings.get(view, {})}
    if own.get(count, parameters[count]) != parameters[count]:
        raise InputError(
            f"view {view!r}: {count}={own[count]} for reader {name}, but its body {body.name} takes {parameters[count]}"
        )
    return get_reader(name, **{**parameters, **own})


def set_up_view(config: ExtractConfig, view: str, *, bodies: dict[tuple[Any, ...], Any] | None = None) -> ViewSetup:
    """Load and resolve everything that one view needs.

    Args:
        config: the configuration of stage one.
        view: which view.
        bodies: what was loaded and resolved so far, by its settings; views with the same settings share it.

    Raises:
        InputError: no such body, weights, tap or reader, or options that contradict each other.
    """
    bodies = {} if bodies is None else bodies
    name = for_view(config.body, view, "torchvision/densenet121")
    own = view if name.startswith(RUN_PREFIX) else ""  # a run holds a body per view
    settings = (name, own, for_view(config.weights, view, "DEFAULT"), for_view(config.channels, view, 0), config.seed)
    if settings not in bodies:
        bodies[settings] = load_view_body(config, view, seed=config.seed)
    body = bodies[settings]
    reader = reader_name(config, view)
    preprocessing = view_preprocessing(config, view, body, nearest=reader == "mask")
    size = preprocessing.size()
    assert size is not None  # view_preprocessing refuses it
    if reader == "text" and size != (1, 1):
        raise InputError(
            f"view {view!r}: a text is one pixel of as many channels as it has places, but body {body.name} takes "
            f"images of {size[1]} x {size[0]}. Give a body for texts: one whose `preprocessing` holds resize None, "
            "crop 1, a mean of zeros and a std of ones, one for each place."
        )
    asked = for_view(config.tap, view, (Tap(),))
    if (*settings, asked, size) not in bodies:  # several passes, and all weights hashed
        resolved = resolve_taps(body, asked, size)
        bodies[*settings, asked, size] = (resolved, identify(body, resolved, size))
    taps, identities = bodies[*settings, asked, size]
    return ViewSetup(view, body, view_reader(config, view, body), preprocessing, size, taps, identities)


def with_taps_of(setup: ViewSetup, recipe: Recipe) -> ViewSetup:
    """The same view with the taps of a recipe that holds more of them."""
    named = [Tap.create({"module": tap["tap"], "pool": tap["pool"]}) for tap in recipe.taps]
    taps = resolve_taps(setup.body, named, setup.size)
    return replace(setup, taps=taps, identities=identify(setup.body, taps, setup.size))


@dataclass(frozen=True)
class EngineChoice:
    """Which engine and precision run a view, and by which rule they were chosen; `held`: since the store has them."""

    engine: str
    precision: str
    reason: str
    held: bool = False

    def __str__(self) -> str:
        return f"{self.engine} {self.precision} ({self.reason})"


def choose_engine(config: ExtractConfig, setup: ViewSetup, store: FeatureStore | None) -> EngineChoice:
    """Resolve `auto` by rule, never by timing: what the store already holds first, else what is fast here.

    The same command therefore finds its rows again on a machine of another speed, and where what made them is missing.

    Raises:
        InputError: no such device here.
    """
    if config.engine != "auto" and config.precision != "auto":
        return EngineChoice(config.engine, config.precision, "as given")
    held = _held(config, setup, store) if store is not None else {}
    if not held:
        return _fast_engine(config, setup)
    # Most rows first: a trial with another engine must not make the rest be computed anew.
    most = [choice for choice, rows in held.items() if rows == max(held.values())]
    engine, precision = most[0] if len(most) == 1 else max(most, key=lambda choice: _suits(choice, config.device))
    return EngineChoice(engine, precision, f"the store holds {held[engine, precision]:,} rows made so", held=True)


def _held(config: ExtractConfig, setup: ViewSetup, store: FeatureStore) -> dict[tuple[str, str], int]:
    """Rows of this view's recipe in the store, by the engine and precision that made them; only what was asked for."""
    held: dict[tuple[str, str], int] = {}
    for info in store.recipes():
        engine, precision = info.recipe.fields["engine"], info.recipe.fields["precision"]
        if config.engine not in ("auto", engine) or config.precision not in ("auto", precision) or not info.rows:
            continue
        if info.recipe.holds(setup.recipe(engine=engine, precision=precision, storage_dtype=config.store_dtype)):
            held[engine, precision] = held.get((engine, precision), 0) + info.rows
    return held


def _suits(choice: tuple[str, str], device: str) -> tuple[bool, bool, bool]:
    """Whether an engine and precision run here at all, by the faster engine, in the precision that is fast."""
    engine, precision = choice
    try:
        where, _ = resolve_engine(engine, precision, device)
        fast = resolve_engine(engine, "auto", device)[1] if engine == "openvino" else fast_precision(where)
    except (InputError, DependencyError):
        return False, False, False
    return True, engine == "openvino", precision == fast


def _fast_engine(config: ExtractConfig, setup: ViewSetup) -> EngineChoice:
    """What is fast here and can run the body. Tries to convert it, unless that was tried before."""
    device = resolve_device(config.device)
    why = ""
    if config.engine == "openvino":
        return EngineChoice("openvino", resolve_engine("openvino", config.precision, config.device)[1], "as given")
    if config.engine == "auto" and device.type == "cpu" and config.precision != "fp16":
        try:
            precision = resolve_engine("openvino", config.precision, device)[1]
            load_graph(setup.tapped(), setup.size, setup.preprocessing.channels, setup.identities)
            return EngineChoice("openvino", precision, "fast on a CPU")
        except DependencyError:
            why = "; openvino is not installed"
        except ConversionError as error:
            why = "; openvino can't run this body"
            warnings.warn(f"{setup.body.name} runs on torch, which is slower on a CPU: {error}", stacklevel=2)
        except InputError:  # bf16, which torch can compute on any CPU
            why = "; openvino can't compute it here"
    if config.precision != "auto":
        return EngineChoice("torch", config.precision, f"as given{why}")
    fast = fast_precision(device)
    return EngineChoice("torch", fast, f"{fast} is fast here{why}")


def check_engines(config: ExtractConfig, setups: Iterable[ViewSetup]) -> None:
    """Refuse an engine that can't run a body, before there is a store.

    Raises:
        InputError: the engine that was asked for can't run a view's body.
    """
    if config.engine != "openvino" or StorePaths(config.store).index.exists():
        return  # what a store holds can be reused where it could not be computed
    for setup in setups:
        load_graph(setup.tapped(), setup.size, setup.preprocessing.channels, setup.identities)
