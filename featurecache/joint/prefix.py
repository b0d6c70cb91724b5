"""What lies below a module from the cache: stage one computes its output once, training reads it batch by batch."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurecache.bodies.identity import Identity, identify
from featurecache.bodies.tapped import Tapped
from featurecache.bodies.taps import dummy
from featurecache.config import ANY_VIEW, BodyConfig, ExtractConfig, JointConfig, ManifestConfig, Tap
from featurecache.errors import InputError, RecipeMismatchError
from featurecache.extract import Summary, extract
from featurecache.joint.images import Batch, Failure, Loaded, SampleImages
from featurecache.joint.mixing import MIXINGS
from featurecache.joint.start import Start
from featurecache.machine.memory import free_memory
from featurecache.progress import Reporter
from featurecache.stageone.extraction import READ_RATE
from featurecache.store.store import FeatureStore

AHEAD = 3  # batches that are read before the one that the device works on
TRIED = 8  # images by which reading is compared with computing
_REPLICA = 0x7265706C  # tells the draw of a replica apart from the other draws of a sample


class AsStored:
    """Stands where a view's preprocessing does: activations need none."""

    def normalise(self, batch: Tensor, layout: torch.memory_format) -> Tensor:
        """The same in float32."""
        return batch.float()


def dataset_name(start: Start) -> str:
    """The name under which the store knows these activations."""
    modules = dict.fromkeys(upper.cut.tap for upper in start.uppers.values())
    return f"{start.manifest.path.stem}.below.{'+'.join(modules)}"


def cache_lower_part(start: Start, reporter: Reporter) -> Summary:
    """Write what the modules that training starts from give for every image, unless the store has it.

    Raises:
        InputError: augmentation that differs between views.
        RecipeMismatchError: stage one loads another body than training.
        StoreError: the activations don't fit on the disk, or the store can't be written.
    """
    config = start.config
    stage = ExtractConfig(
        **config.fields_of(BodyConfig, ManifestConfig),
        store=config.store or Path(),
        name=dataset_name(start),
        replace=True,
        seed=start.seed,
        tap={view: (Tap(module=upper.cut.tap, pool="none"),) for view, upper in start.uppers.items()},
        engine=config.engine,
        device=config.device,
        precision=config.precision,
        workers=config.workers,
        store_dtype=config.store_dtype,
        replicas=config.replicas,
        augment=replica_augmentation(config),
    )
    if not config.replicas and any(set(names) - set(MIXINGS) for names in config.augment.values()):
        reporter.note("--train-from without --replicas: the cached activations are of the plain images, not augmented")
    summary = extract(stage, reporter)
    check_weights(start, lower_identities(start))
    return summary


def replica_augmentation(config: JointConfig) -> tuple[str, ...]:
    """What is changed at random in replicas, which all views have in common.

    Raises:
        InputError: it differs between views, or replicas are wanted without any.
    """
    if not config.replicas:
        return ()
    if config.augment_column:
        raise InputError("--replicas: all samples have as many of them; leave out --augment-column")
    if set(config.augment) - {ANY_VIEW}:
        raise InputError("--replicas: they are augmented alike in all views; leave VIEW= out of --augment")
    names = tuple(name for name in config.augment.get(ANY_VIEW, ()) if name not in MIXINGS)
    if not names:
        raise InputError("--replicas: without --augment they would all be the plain image; leave one of them out")
    return names


def lower_identities(start: Start) -> dict[str, Identity]:
    """Per view the digests of weights and program of the part of its body that is cached, as they are now."""
    return {
        view: identify(start.setups[view].body, (upper.cut,), start.setups[view].size)[0]
        for view, upper in start.uppers.items()
    }


def check_weights(start: Start, found: Mapping[str, Identity]) -> None:
    """Refuse activations that other weights have made than those that the bodies hold below the cut.

    Raises:
        RecipeMismatchError: names the view.
    """
    with FeatureStore.create_or_open(start.config.store or Path(), write=False) as store:
        binding = store.binding(dataset_name(start))
        recipes = {view: store.recipe(binding.recipes[view]).recipe for view in start.uppers}
    for view, upper in start.uppers.items():
        recipe = recipes[view]
        entry = next(tap for tap in recipe.taps if tap["name"] == upper.cut.name)
        if any(entry[name] != value for name, value in found[view]._asdict().items()):
            raise RecipeMismatchError(
                f"{start.config.store}: the activations of view {view!r} at {upper.cut.tap} are of other weights than "
                "its body holds below it, so they would be stale. Nothing below that module may change."
            )


class StoredMaps(SampleImages):
    """The activations of a manifest's images by sample, in the place of the images.

    Where an epoch is given, each sample is one of its replicas or the plain image, drawn alike for all of its views.

    Args:
        start: with the bodies cut, and the lower part cached.

    The store stays open until `close`.
    """

    def __init__(self, start: Start) -> None:
        config = start.config
        super().__init__(start.manifest, start.setups, seed=config.seed, view_dropout=config.view_dropout or 0.0)
        self._store = FeatureStore.create_or_open(config.store or Path(), write=False)
        binding = self._store.binding(dataset_name(start))
        self._taps = {view: upper.cut.name for view, upper in start.uppers.items()}
        self._shapes = {view: upper.cut.shape for view, upper in start.uppers.items()}
        self._recipes: dict[str, list[str]] = {}
        self._rows: dict[str, list[NDArray[np.int64]]] = {}
        drawn = binding.config.get("replicas") or {}
        for view in self.views:
            self._recipes[view] = [binding.recipes[view]]
            self._rows[view] = [self._store.resolve(binding, view).grid(len(self))]
            for number in range(config.replicas):
                recipe = str(drawn[view]["recipe"])
                cells = self._store.resolve(binding, view, recipe_id=recipe, replica=number)
                self._recipes[view].append(recipe)
                self._rows[view].append(cells.grid(len(self)))
        self._ordinals: list[int] = start.manifest.cells["ordinal"].to_list()
        self._keys = {
            (int(sample), str(view), int(ordinal)): key
            for sample, view, ordinal, key in binding.cells.select("sample", "view", "ordinal", "key").iter_rows()
        }

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def items(
        self, samples: Sequence[int] | NDArray[np.int64], *, epoch: int | None = None, workers: int = 1, ahead: int = 64
    ) -> Generator[Loaded | Failure, None, None]:
        """Which samples are whole, and the keys of their images; nothing is read."""
        for sample in map(int, samples):
            failure = self._failure(sample)
            keys = (
                self._keys.get((sample, view, ordinal)) for view in self.views for ordinal in self._of(view, sample)
            )
            yield failure or Loaded(sample, {}, tuple(key for key in keys if key is not None))

    def batches(
        self, plan: Sequence[NDArray[np.int64]], *, epoch: int | None = None, workers: int = 1
    ) -> Generator[Batch, None, None]:
        """The batches of a plan, in order, read by a thread that is a few batches in front."""
        with ThreadPoolExecutor(1, thread_name_prefix="activations") as pool:
            waiting = [pool.submit(self.batch, part, epoch) for part in plan[:AHEAD]]
            try:
                for number in range(len(plan)):
                    batch = waiting.pop(0).result()
                    if number + AHEAD < len(plan):
                        waiting.append(pool.submit(self.batch, plan[number + AHEAD], epoch))
                    yield batch
            finally:
                for future in waiting:
                    future.cancel()

    def batch(self, samples: NDArray[np.int64], epoch: int | None = None) -> Batch:
        """One batch; its `images` are activations, (m, *shape) in the storage dtype."""
        failures = {int(sample): failure for sample in samples if (failure := self._failure(int(sample)))}
        kept = np.array([sample for sample in samples if int(sample) not in failures], dtype=np.int64)
        present = (
            torch.stack([self.shown(int(sample), epoch) for sample in kept])
            if len(kept)
            else torch.zeros((0, len(self.views)), dtype=torch.bool)
        )
        versions = self._versions(kept, epoch)
        images: dict[str, Tensor] = {}
        owner: dict[str, Tensor] = {}
        for number, view in enumerate(self.views):
            places = [
                (position, ordinal)
                for position, sample in enumerate(kept)
                if bool(present[position, number])
                for ordinal in self._of(view, sample)
            ]
            if places:
                positions, ordinals = (np.array(part, dtype=np.int64) for part in zip(*places, strict=True))
                images[view] = self.read(view, kept[positions], ordinals, versions[positions])
                owner[view] = torch.from_numpy(positions)
        return Batch(kept, present, images, owner, tuple(failures.values()))

    def _versions(self, samples: NDArray[np.int64], epoch: int | None) -> NDArray[np.int64]:
        """(n,) which version of each sample is shown: 0 is the plain one."""
        count = len(self._rows[self.views[0]])
        if epoch is None or count == 1:
            return np.zeros(len(samples), dtype=np.int64)
        seeds = ([self._seed, epoch, int(sample), _REPLICA] for sample in samples)
        return np.array([np.random.default_rng(seed).integers(count) for seed in seeds], dtype=np.int64)

    def held(self, view: str) -> NDArray[np.int64]:
        """Samples whose (first) image of a view is cached."""
        return np.flatnonzero(self._rows[view][0][:, 0] >= 0).astype(np.int64)

    def read(
        self, view: str, samples: NDArray[np.int64], ordinals: NDArray[np.int64], versions: NDArray[np.int64]
    ) -> Tensor:
        """Activations (n, *shape), in the storage dtype, of images named by sample, ordinal and version, each (n,)."""
        rows = np.stack([grid[samples, ordinals] for grid in self._rows[view]])
        chosen = rows[versions, np.arange(len(samples))]
        versions = np.where(chosen >= 0, versions, 0)  # a replica that could not be made: the plain image
        chosen = np.where(chosen >= 0, chosen, rows[0])
        out: NDArray[Any] | None = None
        for version in np.unique(versions):
            here = versions == version
            values = self._store.read(self._recipes[view][version], self._taps[view], chosen[here])
            if out is None:
                out = np.empty((len(samples), *self._shapes[view]), values.dtype)
            out[here] = values
        assert out is not None  # called with at least one sample
        return torch.from_numpy(out)

    def _of(self, view: str, sample: int) -> list[int]:
        """The ordinals of a sample's images."""
        return [self._ordinals[cell.index] for cell in self._cells[view][sample]]

    def _failure(self, sample: int) -> Failure | None:
        """An image of a sample that stage one could not read, if there is one."""
        for view in self.views:
            for cell, ordinal in zip(self._cells[view][sample], self._of(view, sample), strict=True):
                if self._rows[view][0][sample, ordinal] < 0:
                    return Failure(sample, view, cell.value, self._reason(view, sample, ordinal), cell.index)
        return None

    def _reason(self, view: str, sample: int, ordinal: int) -> str:
        known = self._store.failures(self._recipes[view][0])
        key = self._keys.get((sample, view, ordinal))
        return known[key][1] if key in known else "could not be read when its activations were cached"


def compare_speed(start: Start, maps: StoredMaps, reporter: Reporter) -> None:
    """Say so where reading activations back takes longer than computing them from the images."""
    for view, upper in start.uppers.items():
        body, size = start.setups[view].body, start.setups[view].size
        held = maps.held(view)
        some = held[:TRIED]
        if not len(some):
            continue
        plain = np.zeros(len(some), dtype=np.int64)
        with torch.inference_mode():
            reading = _seconds(partial(maps.read, view, some, plain, plain)) / len(some)
            computing = _seconds(partial(Tapped(body, [upper.cut]), dummy(body, size, len(some)))) / len(some)
        row = maps.read(view, some, plain, plain)[0].nbytes
        if row * len(held) > free_memory():  # then it comes from the disk, in every epoch
            reading = max(reading, row / READ_RATE)
        if reading > computing:
            reporter.note(
                f"{view}: reading {row / 1e6:,.2f} MB an image back takes longer ({reading * 1e3:,.2f} ms) than "
                f"computing it ({computing * 1e3:,.2f} ms). Train from a later module, or without --train-from."
            )


def _seconds(work: Callable[[], Any]) -> float:
    """The shortest of three times."""
    return min(timeit.repeat(work, number=1, repeat=3))
