"""What a run recorded, before it is used again: bodies that may be loaded, recipes that must be the same."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from featurecache.bodies.registry import FACTORY, RUN_PREFIX, trusted_factories
from featurecache.bodies.weights import SUFFIXES
from featurecache.config import AUTO, for_view
from featurecache.data.readers import PLUGIN
from featurecache.errors import InputError, MissingFileError, RunError
from featurecache.store.recipe import Recipe, shortened

# Fields of a recipe that say how features are computed and kept, not what they mean: `predict` accepts others.
NUMERIC_FIELDS = ("engine", "precision", "storage_dtype")


def check_bodies(
    source: str | Path, views: Sequence[str], options: Mapping[str, Any], typed: Iterable[str] = ()
) -> None:
    """Refuse a factory that only a run or a store names, and weights and runs that are not where they were.

    Args:
        source: the run or the store, for messages.
        views: that count.
        options: of `BodyConfig`, per view, and `reader`: as recorded, with what the user gave in its place.
        typed: names of bodies and readers that the user typed.

    Raises:
        InputError: a factory is not trusted; says how to allow it.
        MissingFileError: a file or run is gone; says how to tell where it is now.
    """
    allowed = trusted_factories(tuple(options.get("trust_factory") or ())) | set(typed)
    problems = []
    for view in views:
        check_reader(source, for_view(options.get("reader") or {}, view, AUTO), allowed)
        name = for_view(options["body"], view, "")
        weights = for_view(options.get("weights") or {}, view, "")
        of_run = name.startswith(RUN_PREFIX)  # `run:joint` has the form of a factory
        if FACTORY.fullmatch(name) and not of_run and name not in allowed:
            raise InputError(
                f"{source}: names the factory {name!r} as its body. Nothing was imported. If you know and trust that "
                f"code, repeat its name: --trust-factory {name}"
            )
        if weights.endswith(SUFFIXES) and not Path(weights).is_file():
            problems.append(f"weights {weights!r} of view {view!r}: give --weights {view}=PATH")
        if of_run and not Path(name.removeprefix(RUN_PREFIX)).is_dir():
            problems.append(f"body {name!r} of view {view!r}: give --body {view}={RUN_PREFIX}PATH")
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise MissingFileError(f"{source}: its bodies were read from what is not there now{lines}")


def check_reader(source: str | Path, name: str, allowed: Container[str]) -> None:
    """Refuse a plug-in reader that only a run or a store names.

    Raises:
        InputError: it is not among those that the user allowed; says how to allow it.
    """
    if PLUGIN.fullmatch(name) and name not in allowed:
        raise InputError(
            f"{source}: names the function {name!r} as its reader. Nothing was imported. If you know and trust that "
            f"code, repeat its name: --trust-factory {name}"
        )


def read_recipe(entry: Mapping[str, Any]) -> Recipe:
    """The recipe of an entry of `Run.recipes`.

    Raises:
        RunError: there is none.
    """
    recipe = entry.get("recipe")
    if not isinstance(recipe, Mapping):
        raise RunError("run.json: a view's entry in `recipes` holds no `recipe`; the run is incomplete, make it again")
    return Recipe.from_json(recipe)


def recipe_differences(then: Recipe, now: Recipe) -> tuple[str, str]:
    """What differs, in fields that change what features mean, and in those that only round.

    Of the taps those count that both have: each with its pooling, weights and program.
    """
    shared = set(then.tap_names) & set(now.tap_names)
    if not shared:
        return f"taps {', '.join(then.tap_names)} -> {', '.join(now.tap_names)}", ""
    then, now = (Recipe(r.fields, tuple(tap for tap in r.taps if tap["name"] in shared)) for r in (then, now))
    parts: dict[bool, list[str]] = {True: [], False: []}
    for name, old, new in then.differences(now):
        parts[name.partition(".")[0] in NUMERIC_FIELDS].append(f"{name} {shortened(old)} -> {shortened(new)}")
    return ", ".join(parts[False]), ", ".join(parts[True])
