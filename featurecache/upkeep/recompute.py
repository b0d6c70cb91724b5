"""`verify --recompute`: rows drawn at random are extracted once more and compared with what the store holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.bodies.engines import Engine, make_engine, resolve_device
from featurecache.config import BodyConfig, ExtractConfig, ManifestConfig
from featurecache.data.manifest import read_manifest
from featurecache.data.preprocessing import stack
from featurecache.data.readers.base import ReadFailure
from featurecache.errors import FeatureCacheError, InputError
from featurecache.rundir.recorded import check_bodies, recipe_differences
from featurecache.stageone.canary import TOLERANCE, changed_versions, versions
from featurecache.stageone.keys import Cell, Cells, read_payload
from featurecache.stageone.producer import decode
from featurecache.stageone.replicas import replica_of
from featurecache.stageone.viewsetup import ViewSetup, set_up_view
from featurecache.store.binding import Binding
from featurecache.store.store import FeatureStore, RecipeInfo

BATCH = 16
UNBOUND = "no dataset names it"


@dataclass(frozen=True)
class Row:
    """A row of a recipe that was drawn."""

    id: int
    key: bytes
    replica: int


@dataclass
class RecipeDrift:
    """What became of the rows of one recipe.

    Attributes:
        recipe: its id.
        tolerance: what its drift may be, by its precision.
        recomputed: rows that were extracted once more.
        missing: why others could not be -> how many.
        drifts: tap -> largest drift of a row.
        worst: tap -> the sample it belongs to.
        versions_then: of the libraries when the recipe was made.
        changed: those that are others now, in words.
    """

    recipe: str
    tolerance: float
    versions_then: Mapping[str, str]
    changed: list[str]
    recomputed: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    drifts: dict[str, float] = field(default_factory=dict)
    worst: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no tap drifts beyond tolerance."""
        return all(drift <= self.tolerance for drift in self.drifts.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values; a drift that is no finite number is null."""
        drifts = {tap: drift if np.isfinite(drift) else None for tap, drift in self.drifts.items()}
        return {
            "recipe": self.recipe,
            "recomputed": self.recomputed,
            "not_recomputable": dict(self.missing),
            "tolerance": self.tolerance,
            "drift": drifts,
            "sample_id": self.worst,
            "within_tolerance": self.ok,
            "versions_then": dict(self.versions_then),
        }

    def lines(self) -> list[str]:
        """As a person reads it."""
        lines = [f"recompute {self.recipe}: {self.recomputed:,} rows extracted once more"]
        for tap, drift in self.drifts.items():
            verdict = "" if drift <= self.tolerance else ", TOO MUCH"
            worst = f"; most in sample {self.worst[tap]}" if drift else ""
            lines.append(f"            {tap}: largest drift {drift:.3g} (tolerance {self.tolerance:g}){verdict}{worst}")
        lines += [f"            {count:,} not recomputable: {reason}" for reason, count in self.missing.most_common()]
        lines.append(f"            versions: {'; '.join(self.changed) or 'the same as then'}")
        return lines


@dataclass(frozen=True)
class Recomputation:
    """What `recompute` found, recipe by recipe."""

    recipes: list[RecipeDrift]

    @property
    def recomputed(self) -> int:
        """Rows that were extracted once more."""
        return sum(found.recomputed for found in self.recipes)

    @property
    def ok(self) -> bool:
        """Whether all drift is within tolerance, and something was looked at where there are rows."""
        return all(found.ok for found in self.recipes) and bool(self.recomputed or not self.recipes)

    def to_json(self) -> dict[str, Any]:
        """Flat figures, and the recipes."""
        return {
            "recomputed": self.recomputed,
            "not_recomputable": sum(found.missing.total() for found in self.recipes),
            "within_tolerance": self.ok,
            "versions_now": versions(),
            "recomputation": [found.to_json() for found in self.recipes],
        }


def recompute(
    path: str | Path, rows: int, *, seed: int = 0, device: str = "auto", trust: Sequence[str] = ()
) -> Recomputation:
    """Extract random rows of a store once more: same reader, preprocessing, body, taps, engine and precision.

    Images come from where the datasets' manifests say, and count only if their bytes still are those of the row.

    Args:
        path: of the store; it is only read.
        rows: how many in all, shared out evenly among the recipes.
        seed: of the draw.
        device: where bodies run.
        trust: factories that the user allows; nothing else that a store names is imported.

    Raises:
        InputError: no store there, or `rows` below 1.
        CorruptionError: the stored rows are damaged.
    """
    if rows < 1:
        raise InputError(f"--recompute {rows}: at least 1 is needed")
    with FeatureStore.create_or_open(path, write=False) as store:
        filled = [info for info in store.recipes() if info.rows]
        bindings = [store.binding(name) for name in store.bindings()]
        random = np.random.default_rng(seed)
        counts = shares([info.rows for info in filled], rows)
        return Recomputation(
            [
                RecipeCheck(store, info, bindings, device, trust).run(draw(store, info, count, random))
                for info, count in zip(filled, counts, strict=True)
                if count
            ]
        )


def shares(available: Sequence[int], wanted: int) -> list[int]:
    """How many of each, evenly as far as there are enough: `shares([2, 9], 6)` is [2, 4]."""
    given = [0] * len(available)
    left = min(wanted, sum(available))
    while left:
        open_ones = [place for place, count in enumerate(available) if given[place] < count]
        each = max(1, left // len(open_ones))
        for place in open_ones[:left]:
            more = min(each, available[place] - given[place])
            given[place] += more
            left -= more
    return given


def draw(store: FeatureStore, info: RecipeInfo, count: int, random: np.random.Generator) -> list[Row]:
    """Different rows of a recipe, each as likely as any other."""
    ids, keys, replicas = store.keys(info.id)
    picked = np.sort(random.choice(len(ids), count, replace=False))
    return [Row(int(ids[at]), keys[at].tobytes(), int(replicas[at])) for at in picked]


class RecipeCheck:
    """Extracts rows of one recipe once more."""

    def __init__(
        self, store: FeatureStore, info: RecipeInfo, bindings: Sequence[Binding], device: str, trust: Sequence[str]
    ) -> None:
        self.store, self.info, self.device, self.trust = store, info, device, trust
        self.views = [(binding, view) for binding in bindings for view in views_of(binding, info.id)]
        self.bindings = list({binding.name: binding for binding, _ in self.views}.values())
        self.found = RecipeDrift(
            recipe=info.id,
            tolerance=TOLERANCE[info.recipe.fields["precision"]],
            versions_then=info.recorded.get("versions", {}),
            changed=changed_versions(info.recorded),
        )

    def run(self, rows: Sequence[Row]) -> RecipeDrift:
        """Compare the rows that can be had with what is stored."""
        try:
            setup, engine = self.prepare()
        except FeatureCacheError as error:
            self.found.missing[" ".join(str(error).split())] += len(rows)
            return self.found
        cells, reasons = self.cells_of({row.key for row in rows})
        kept: list[Row] = []
        names: list[str] = []
        outputs: list[list[NDArray[Any]]] = []
        for batch in batches(self.images(rows, cells, reasons, setup)):
            kept += [row for row, _, _ in batch]
            names += [name for _, name, _ in batch]
            arrays = engine(stack([image for _, _, image in batch]))
            dtype = np.dtype(self.info.recipe.storage_dtype)
            with np.errstate(over="ignore"):  # rounded as the stored rows are, so that only drift is left
                outputs.append([array.astype(dtype) for array in arrays])
        self.found.recomputed = len(kept)
        if kept:
            self.compare(setup, kept, names, [np.concatenate(arrays) for arrays in zip(*outputs, strict=True)])
        return self.found

    def prepare(self) -> tuple[ViewSetup, Engine]:
        """Body, reader and preprocessing as a dataset names them, and their engine.

        Raises:
            FeatureCacheError: they can't be had, or are not those of the recipe any more.
        """
        recipe, problem = self.info.recipe, FeatureCacheError(UNBOUND)
        for binding, view in self.views:
            try:
                setup = self.set_up(binding, view)
                numbers = {name: str(recipe.fields[name]) for name in ("engine", "precision", "storage_dtype")}
                now = setup.recipe(**numbers)
                replica = replica_of(recipe, setup.preprocessing, 0)
                now = now if replica is None else replica.recipe(now)
                if now.digest != recipe.digest:
                    raise FeatureCacheError(f"the body is another one now: {recipe_differences(recipe, now)[0]}")
                return setup, make_engine(
                    setup.tapped(),
                    setup.preprocessing,
                    engine=numbers["engine"],
                    precision=numbers["precision"],
                    device=resolve_device(self.device),
                    identities=setup.identities,
                )
            except FeatureCacheError as error:
                problem = error
        raise problem

    def set_up(self, binding: Binding, view: str) -> ViewSetup:
        """What a dataset's view was extracted with; a factory must be trusted."""
        body = {name: value for name, value in binding.config["body"].items() if name in BodyConfig.model_fields}
        body["trust_factory"] = tuple(self.trust)
        check_bodies(self.store.path, [view], {**body, "reader": binding.config["manifest"]["reader"]})
        config = ExtractConfig.create(
            {
                **binding.config["manifest"],
                **body,
                "seed": binding.config.get("seed"),
                "tap": [{"module": tap["tap"], "pool": tap["pool"]} for tap in self.info.recipe.taps],
                "store": self.store.path,
            },
            source=f"dataset {binding.name!r}",
        )
        return set_up_view(config, view)

    def cells_of(self, keys: set[bytes]) -> tuple[dict[bytes, list[tuple[str, Cell]]], dict[bytes, str]]:
        """Per key the cells that had it, with their sample's id; and why others have none."""
        cells: dict[bytes, list[tuple[str, Cell]]] = {}
        reasons: dict[bytes, str] = {}
        for binding in self.bindings:
            held = binding.cells.filter(pl.col("key").is_in(list(keys)))
            if not held.height:
                continue
            try:
                manifest = read_manifest(ManifestConfig.create(binding.config["manifest"]), images=False)
            except FeatureCacheError as error:
                why = f"the manifest of dataset {binding.name!r} can't be read ({str(error).splitlines()[0]})"
                reasons |= dict.fromkeys(held["key"].to_list(), why)
                continue
            places = {name: number for number, name in enumerate(manifest.table["sample_id"].to_list())}
            names = [str(name) for name in binding.sample_ids[held["sample"].to_numpy()]]
            wanted = held.with_columns(
                pl.Series("sample", [places.get(name) for name in names], dtype=pl.UInt32), pl.Series("name", names)
            ).select("sample", "view", "ordinal", "key", "name")
            listed = manifest.cells.with_row_index("index").filter(pl.col("value").is_not_null())
            found = listed.join(wanted, on=["sample", "view", "ordinal"], how="inner")
            present = Cells(manifest.cells, found["index"].to_numpy())
            for key, name, cell in zip(found["key"].to_list(), found["name"].to_list(), present, strict=True):
                cells.setdefault(key, []).append((name, cell))
            reasons |= {key: "its manifest no longer lists it" for key in held["key"].to_list() if key not in cells}
        return cells, reasons

    def images(
        self,
        rows: Sequence[Row],
        cells: Mapping[bytes, list[tuple[str, Cell]]],
        reasons: Mapping[bytes, str],
        setup: ViewSetup,
    ) -> Iterator[tuple[Row, str, Any]]:
        """(row, sample id, preprocessed image) of the rows whose image is still there, unchanged and readable."""
        for row in rows:
            reason = reasons.get(row.key, UNBOUND)
            for name, cell in cells.get(row.key, ()):
                payload = read_payload(cell)
                if isinstance(payload, ReadFailure):
                    reason = "its file is gone or can't be read"
                    continue
                if payload.key != row.key:
                    reason = "its file has changed"
                    continue
                replica = replica_of(self.info.recipe, setup.preprocessing, row.replica)
                step = setup.preprocessing if replica is None else replica.of(row.key)
                image = decode(setup.reader, step, payload.data, cell.selector)
                if isinstance(image, ReadFailure):
                    reason = f"its image can't be read any more: {image.message}"
                    continue
                yield row, name, image
                break
            else:
                self.found.missing[reason] += 1

    def compare(self, setup: ViewSetup, rows: Sequence[Row], names: Sequence[str], now: list[NDArray[Any]]) -> None:
        """Note the largest drift of each tap, and the sample that it belongs to."""
        for tap, features in zip(setup.taps, now, strict=True):
            stored = self.store.read(self.info.id, tap.name, [row.id for row in rows])
            drifts = row_drifts(features, stored)
            self.found.drifts[tap.name] = float(drifts.max())
            self.found.worst[tap.name] = names[int(drifts.argmax())]


def views_of(binding: Binding, recipe: str) -> list[str]:
    """The views of a dataset whose features, or whose replicas', are in a recipe."""
    replicas = {view: entry["recipe"] for view, entry in binding.config.get("replicas", {}).items()}
    return [view for view, name in binding.recipes.items() if recipe in (name, replicas.get(view))]


def batches(items: Iterator[Any], size: int = BATCH) -> Iterator[list[Any]]:
    """Lists of up to `size`."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def row_drifts(now: NDArray[Any], then: NDArray[Any]) -> NDArray[np.float64]:
    """How far each row moved, ||now - then||, relative to how far rows lie from their mean.

    Centred, since features of different images have most in common: against their length even another image's row
    would be near. Where there is one row, or all are the same, it is relative to its length.

    Args:
        now: (n, ...) of any float dtype.
        then: the same shape.

    Returns:
        (n,), infinite where a row holds what is not finite.
    """
    new, old = (array.reshape(len(array), -1).astype(np.float64) for array in (now, then))
    spread = np.linalg.norm(old - old.mean(axis=0), axis=1)
    typical = float(np.sqrt(np.mean(spread**2))) or float(np.linalg.norm(old, axis=1).max()) or 1.0
    with np.errstate(invalid="ignore"):
        moved = np.linalg.norm(new - old, axis=1) / np.maximum(spread, typical)
    return np.where(np.isfinite(moved), moved, np.inf)
