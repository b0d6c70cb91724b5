"""What a joint run's report shows beside its results, as a head's run does: flow of samples, leaks, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.data.dense import DenseTarget
from featurecache.fusion import get_fusion
from featurecache.heads.fc import FCHead
from featurecache.joint.images import SampleImages
from featurecache.joint.pairing import PairImages
from featurecache.joint.predict import joint_scores
from featurecache.joint.runner import Runner
from featurecache.joint.samples import Samples
from featurecache.joint.start import Start
from featurecache.reporting.thumbnails import Pictures
from featurecache.rundir.densefit import write_pictures
from featurecache.rundir.densepredictions import DensePredictions
from featurecache.rundir.files import ABOUT
from featurecache.rundir.fitrecord import read_about
from featurecache.rundir.flow import flow_record
from featurecache.rundir.mistakes import single_views, write_mistakes
from featurecache.rundir.notes import run_notes
from featurecache.rundir.results import Results


def samples_record(start: Start, images: SampleImages, samples: Samples) -> dict[str, Any]:
    """What run.json says of the flow of samples, and of leaks; of pairs it counts the samples that they are made of."""
    if isinstance(images, PairImages) and start.single is not None:
        start, samples = start.single, images.apart
    ids, rows = start.manifest.table["sample_id"].to_list(), samples.rows
    found = flow_record(
        start.manifest.table,
        start.config.group,
        ids=[ids[row] for row in rows],
        groups=samples.groups,
        known=start.target.known[rows],
        splits=samples.splits,
        sides=samples.splits,
        content=samples.content,
        unreadable={ids[failure.sample] for failure in samples.failed},
        targets=start.target.names,
    )
    notes = run_notes(found, start.target.subset(rows), start.config.task)
    return {**found, "notes": notes, "missing": start.config.missing}


def views_alone(
    start: Start, runner: Runner, images: SampleImages, head: FCHead, samples: Samples, *, batch_size: int, workers: int
) -> dict[str, NDArray[np.float64]]:
    """By view the scores (n, outputs) where the network gets that view alone; see `single_views`.

    Nothing where that would say nothing: of pairs, of views that count together only, and of tasks without classes.
    """
    if start.single is not None or get_fusion(start.config.fusion).needs_all or not head.classes_:
        return {}

    def ask(number: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        wanted = samples.rows[rows]
        found, outputs, _ = runner.predict(images, wanted, alone=number, batch_size=batch_size, workers=workers)
        scores = np.full((len(rows), len(head.outputs)), np.nan)
        scores[np.isin(wanted, found)] = joint_scores(head, outputs)
        return scores

    return single_views(images.views, samples.present, samples.splits, len(head.outputs), ask)


def write_shown(
    directory: Path,
    start: Start,
    images: SampleImages,
    results: Results,
    single: dict[str, NDArray[np.float64]],
) -> None:
    """Write about.toml, mistakes.json and pictures/ into a run that is being written.

    Args:
        directory: of the run.
        start: what was trained.
        images: what was read.
        results: as written.
        single: from `views_alone`.
    """
    about = read_about(start.config.about)
    if about:
        (directory / ABOUT).write_text(about, encoding="utf-8")

    def pictures() -> Pictures:
        recipes = {
            view: setup.recipe(engine="torch", precision="fp32", storage_dtype="float32")
            for view, setup in (start.single or start).setups.items()
        }
        if isinstance(images, PairImages):
            return images.pictures(start.manifest, recipes)
        return Pictures.of_manifest(start.manifest, recipes)

    if isinstance(results.predictions, DensePredictions) and isinstance(start.target, DenseTarget):
        row_of = {name: row for row, name in enumerate(start.manifest.table["sample_id"].to_list())}
        target = start.target.subset(np.array([row_of[name] for name in results.predictions.sample_ids.tolist()]))
        write_pictures(directory, results.predictions, target, pictures().seen, images=start.config.images)
        return
    write_mistakes(directory, results.predictions, results.threshold, single, images=start.config.images,
                   pictures=pictures)  # fmt: skip
