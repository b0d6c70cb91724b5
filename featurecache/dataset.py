"""FeatureDataset: a dataset of a store as rows of features and targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from featurecache.amounts import counted
from featurecache.config import ANY_VIEW, for_view
from featurecache.data.dense import DENSE
from featurecache.data.targets import Target, read_target
from featurecache.errors import InputError, did_you_mean
from featurecache.export import to_frame, to_xarray
from featurecache.features.features import Block
from featurecache.features.masks import bound_masks, read_masks
from featurecache.features.pairs import PairDataset
from featurecache.features.stacked import Replicas, find_replicas
from featurecache.features.stored import Memory, StoreFeatures, ViewRows
from featurecache.features.stream import FeatureStream
from featurecache.store.binding import Binding
from featurecache.store.recipe import Recipe
from featurecache.store.store import FeatureStore
from featurecache.upkeep.rebinding import check_fresh, rebind, short_list

if TYPE_CHECKING:
    import xarray


class FeatureDataset(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The samples of a dataset in a store: features of all views side by side, and targets from its manifest.

    Args:
        store: path of the store.
        dataset: the dataset's name in it.
        target: target column or columns; without it `target` is None and items have an empty target.
        views: which views, default all.
        tap: which taps, as `extract` was told them (`layer4:avg`, or `layer4` for all its poolings), for all views or
            per view; features come in this order. Default the only one.
        recipe: digest or first digits of the recipe to read, for all views or per view; default the dataset's.
        task: what the target is, default told from its values.
        uncertain: what a label such as `-1` means: {"-1": "ignore" | "zero" | "one"}.
        masks: with the task `dense`, where the target is a column of mask images: how a pixel says its class, by its
            grey value (`index`), or inside and outside by colour (`inside`) or by opacity (`alpha`).
        missing: `zero` keeps samples that lack a view (their block is NaN, each head has its own way with it),
            `drop` leaves them out, `error` refuses.
        allow_partial: take what is there although extraction has not ended.
        manifest: a corrected manifest whose labels are to be bound; images must be the same.
        memory: bytes of features to hold in RAM; above it they are streamed. `auto` maps files that can be mapped, see
            `featurecache.features.stored.choose_mode`; `features.mode` says what was chosen.
        replicas: whether heads learn from the random versions of the images too, where the dataset was extracted with
            `--replicas`. Features, targets and lengths here are always those of the plain images.

    Attributes:
        sample_ids: (n,) array of str.
        features: `featurecache.features.features.Features`, (n, d).
        target: `Target` of n rows, or None.
        table: the manifest's rows of these samples.
        recipes: the recipe of each view.
        content: per sample the keys of its images as hex, by which leaks are found.
        failed: per view the ids of samples that have an image of it that could not be read: it counts as missing.
        n_dropped: samples of the manifest that are left out.
        missing: as given.

    Raises:
        InputError: names what is wrong and what there is: dataset, views, taps, columns; cells not yet extracted;
            a manifest that has changed since.
    """

    def __init__(
        self,
        store: str | Path,
        *,
        dataset: str,
        target: str | Sequence[str] | None = None,
        views: Sequence[str] | None = None,
        tap: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
        recipe: Mapping[str, str] | str | None = None,
        task: str = "auto",
        uncertain: Mapping[str, str] | None = None,
        masks: str = "index",
        missing: str = "zero",
        allow_partial: bool = False,
        manifest: str | Path | None = None,
        memory: Memory = "auto",
        replicas: Literal["all", "none"] = "all",
    ) -> None:
        if manifest is not None:
            with FeatureStore.create_or_open(store, write=True) as writable:
                rebind(writable, find_binding(writable, dataset), Path(manifest))
        self.store = FeatureStore.create_or_open(store, write=False)
        self.binding = find_binding(self.store, dataset)
        check_fresh(self.binding)
        self.views = choose_views(self.binding, views)
        taps = {view: (names,) if isinstance(names, str) else tuple(names) for view, names in per_view(tap).items()}
        wanted = per_view(recipe)
        for option, given in (("--tap", taps), ("--recipe", wanted)):
            check_views(self.binding, [view for view in given if view != ANY_VIEW], option)
        parts = [
            view_rows(self.store, self.binding, view, for_view(taps, view, ()), for_view(wanted, view, ""))
            for view in self.views
        ]
        if not allow_partial:
            check_extracted(self.binding, parts)
        self.failed = {part.view: sample_names(self.binding, part.failed) for part in parts}
        held = np.stack([(part.rows >= 0).any(axis=1) for part in parts], axis=1)
        kept = choose_samples(self.binding, self.views, held, missing)
        parts = [replace(part, rows=part.rows[kept]) for part in parts]
        self.n_dropped = self.binding.table.height - len(kept)
        self.missing = missing
        self.table: pl.DataFrame = self.binding.table[kept]
        self.sample_ids: NDArray[np.str_] = self.table["sample_id"].to_numpy().astype(np.str_)
        self.present: NDArray[np.bool_] = held[kept]
        self.features = StoreFeatures(self.store, parts, self.binding.multi, memory)
        self._find_replicas = partial(
            find_replicas, self.store, self.binding, parts=parts, kept=kept, memory=memory, allow_partial=allow_partial
        )
        self._with_replicas = replicas == "all"
        self.recipes: dict[str, Recipe] = {part.view: part.info.recipe for part in parts}
        self.content = sample_content(self.binding, self.views, kept)
        self.target: Target | None = None
        columns = (target,) if isinstance(target, str) else tuple(target or ())
        self.target_config = {"target": list(columns), "task": task, "uncertain": dict(uncertain or {})}
        self.memory = None if memory == "auto" else memory
        if columns and task == DENSE:
            self.target_config["masks"] = masks
            files = bound_masks(
                self.binding, self.sample_ids.tolist(), columns, self.recipes, values=masks, uncertain=uncertain or {}
            )
            self.target = read_masks(files, source=self.binding.manifest_path)
        elif columns:
            self.target = find_target(self.binding, self.table, columns, task, dict(uncertain or {}))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Which columns belong to which view and tap."""
        return self.features.blocks

    @cached_property
    def replicas(self) -> Replicas | None:
        """Random versions of the images, which heads learn from too; None where there are none, or they aren't wanted.

        Raises:
            InputError: they are not yet extracted.
        """
        return self._find_replicas(self.features) if self._with_replicas else None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __repr__(self) -> str:
        views = ", ".join(self.views)
        target = f", target={', '.join(self.target.names)} ({self.target.task})" if self.target is not None else ""
        return (
            f"FeatureDataset({self.binding.name!r}: {counted(len(self), 'sample')}, {self.features.shape[1]:,} features"
            f" of {views}{target})"
        )

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(features, target) of one sample: float32 (d,), and the target's values (empty without a target)."""
        features = torch.from_numpy(self.features[np.array([index])][0])
        target = torch.empty(0) if self.target is None else torch.as_tensor(self.target.values[index])
        return features, target

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Several samples by one read: what a DataLoader calls for a batch."""
        features = torch.from_numpy(self.features[np.asarray(indices, dtype=np.int64)])
        if self.target is None:
            return [(row, torch.empty(0)) for row in features]
        targets = torch.as_tensor(self.target.values[indices])
        return list(zip(features, targets, strict=True))

    def numpy(self) -> tuple[NDArray[np.float32], NDArray[Any] | None]:
        """All features (n, d) float32, and the target's values (None without a target).

        Unknown labels are -1 where the target has classes, else NaN; a missing view's features are NaN.
        """
        values = None if self.target is None else self.target.values
        return self.features[np.arange(len(self))], values

    def arrow(self) -> pl.DataFrame:
        """All samples as a table that any Arrow library takes without a copy, as in `pyarrow.table(dataset.arrow())`.

        The manifest's columns, `sample_id` first, then `view.tap`, a fixed-size list of float32, null where the sample
        lacks the view. `.write_parquet(path)` writes it; `featurecache.export.export` writes what is larger than RAM.
        """
        return to_frame(self.features, self.table)

    def xarray(self) -> xarray.Dataset:
        """All samples as an xarray Dataset with named dimensions; see `featurecache.export.to_xarray`."""
        return to_xarray(self.features, self.sample_ids, self.target)

    def stream(self, rows: NDArray[np.int64] | None = None, **options: Any) -> FeatureStream:
        """Batches by whole chunks, for a plain loop or a DataLoader with `batch_size=None`; see `FeatureStream`."""
        return FeatureStream(self.features, self.target, rows, **options)

    def pairs(self, rows: NDArray[np.int64] | None = None, **options: Any) -> PairDataset:
        """Pairs of the same and of different classes; see `featurecache.features.pairs.PairDataset`.

        Raises:
            InputError: the dataset has no target, or one without classes.
        """
        if self.target is None:
            raise InputError("pairs need a target: give target=COLUMN")
        rows = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        return PairDataset(self.features, rows, self.target.subset(rows), **options)


def find_binding(store: FeatureStore, name: str) -> Binding:
    """The dataset of that name, or an error that lists those there are."""
    names = store.bindings()
    if name not in names:
        known = f"{did_you_mean(name, names)} It holds: {', '.join(names) or 'none yet'}."
        raise InputError(f"{store.path}: no dataset {name!r} in this store.{known}")
    return store.binding(name)


def per_view(option: Any) -> dict[str, Any]:
    """A value for all views, or a mapping by view, as such a mapping."""
    if isinstance(option, Mapping):
        return dict(option)
    return {ANY_VIEW: option} if option else {}


def check_views(binding: Binding, views: Iterable[str], option: str = "--views") -> None:
    """Refuse a view that the dataset does not have."""
    known = tuple(binding.recipes)
    for view in views:
        if view not in known:
            raise InputError(
                f"{option}: dataset {binding.name!r} has no view {view!r}.{did_you_mean(view, known)} "
                f"It has: {', '.join(known)}."
            )


def choose_views(binding: Binding, views: Sequence[str] | None) -> tuple[str, ...]:
    """The views asked for, checked; all by default."""
    check_views(binding, views or ())
    repeated = sorted({view for view in views or () if (views or ()).count(view) > 1})
    if repeated:
        raise InputError(f"--views: {', '.join(repeated)} given twice")
    return tuple(views or binding.recipes)


def view_rows(store: FeatureStore, binding: Binding, view: str, names: tuple[str, ...], recipe: str) -> ViewRows:
    """Rows and taps of one view."""
    info = store.recipe(recipe or binding.recipes[view])
    shapes = {tap: tuple(kept.shape) for tap, kept in info.taps.items()}
    cells = store.resolve(binding, view, recipe_id=info.id)
    pending, failed = (cells.sample[cells.state == state] for state in ("pending", "failed"))
    taps = {tap: shapes[tap] for tap in choose_taps(view, info.id, tuple(shapes), names)}
    return ViewRows(view, info, taps, cells.grid(binding.table.height), pending, failed)


def choose_taps(view: str, recipe: str, held: tuple[str, ...], names: tuple[str, ...]) -> list[str]:
    """The taps of a recipe that are meant, in the order of `names`; without names the only one."""
    if not names:
        if len(held) > 1:
            raise InputError(
                f"view {view!r}: recipe {recipe} holds several taps ({', '.join(held)}). Choose with --tap."
            )
        return list(held)
    chosen: list[str] = []
    for name in names:
        wanted = name.replace(":", "@")
        found = [tap for tap in held if wanted in (tap, tap.partition("@")[0])]
        if not found:
            near = did_you_mean(wanted, [*held, *(tap.partition("@")[0] for tap in held)])
            raise InputError(f"view {view!r}: recipe {recipe} has no tap {name!r}.{near} It holds: {', '.join(held)}.")
        chosen += [tap for tap in found if tap not in chosen]
    return chosen


def find_target(
    binding: Binding, table: pl.DataFrame, columns: tuple[str, ...], task: str, uncertain: Mapping[str, str]
) -> Target:
    """The target columns of the samples."""
    try:
        return read_target(table, columns, task=task, uncertain=uncertain, source=binding.manifest_path)
    except InputError as error:
        long = binding.config.get("manifest", {}).get("layout") == "long"
        if long and not set(columns) <= set(table.columns):
            raise InputError(
                f"{error}\n(long layout: a column that differs between the rows of a sample belongs to none)"
            ) from None
        raise


def check_extracted(binding: Binding, parts: Sequence[ViewRows]) -> None:
    """Refuse cells that are not yet extracted: an interrupted run must not be mistaken for missing views."""
    pending = {part.view: len(part.pending) for part in parts if len(part.pending)}
    if pending:
        ids = sample_names(binding, np.concatenate([part.pending for part in parts]))
        recipes = {part.view: part.info.id for part in parts}
        counts = ", ".join(
            f"{count:,} of view {view!r}"
            + ("" if recipes[view] == binding.recipes[view] else f" in recipe {recipes[view]}")
            for view, count in pending.items()
        )
        raise InputError(
            f"dataset {binding.name!r}: images are not yet extracted ({counts}; samples {short_list(ids)}). "
            "Run `featurecache extract` again to complete it, or take what is there with --allow-partial."
        )


def sample_names(binding: Binding, rows: NDArray[np.int64]) -> list[str]:
    """Ids of samples, each once, in the table's order."""
    return [str(name) for name in binding.sample_ids[np.unique(rows)]]


def choose_samples(binding: Binding, views: Sequence[str], held: NDArray[np.bool_], missing: str) -> NDArray[np.int64]:
    """Which samples are used: those with any view, or with all of them."""
    complete = held.all(axis=1)
    if missing == "error" and not complete.all():
        ids = sample_names(binding, np.flatnonzero(~complete))
        raise InputError(
            f"dataset {binding.name!r}: {counted(len(ids), 'sample')} lack{'s' * (len(ids) == 1)} one of "
            f"{', '.join(views)} ({short_list(ids)}), "
            "and --missing error refuses that. Use --missing zero or drop."
        )
    kept = np.flatnonzero(complete if missing == "drop" else held.any(axis=1))
    if not len(kept):
        raise InputError(f"dataset {binding.name!r}: no sample has features of {', '.join(views)}")
    return kept.astype(np.int64)


def sample_content(binding: Binding, views: Sequence[str], kept: NDArray[np.int64]) -> list[tuple[str, ...]]:
    """Per sample the keys of its images, as hex."""
    cells = binding.cells.filter(pl.col("view").is_in(list(views)) & pl.col("key").is_not_null())
    by_sample: dict[int, list[str]] = {}
    for sample, key in cells.select("sample", "key").iter_rows():
        by_sample.setdefault(sample, []).append(key.hex())
    return [tuple(by_sample.get(int(sample), ())) for sample in kept]
