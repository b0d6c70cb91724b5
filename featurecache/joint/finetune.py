"""Joint fine-tuning from end to end: prepare, choose and split the samples, train, write the run."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch import Tensor

from featurecache.bodies.engines import resolve_device, resolve_precision
from featurecache.config import BodyConfig, JointConfig, ManifestConfig, SplitConfig, TargetConfig
from featurecache.data.targets import Target
from featurecache.data.transforms import Augmentation
from featurecache.errors import InputError, RunError
from featurecache.heads.base import untrainable
from featurecache.heads.fc import FCHead, FCSettings
from featurecache.heads.losses import HeadLoss, target_tensor
from featurecache.joint.build import make_fusion, make_groups, make_head, make_model
from featurecache.joint.checkpoint import FOLDER, Progress, load_state
from featurecache.joint.images import SampleImages
from featurecache.joint.loop import Loop, Plan
from featurecache.joint.model import JointModel
from featurecache.joint.predict import joint_scores
from featurecache.joint.runner import Runner, make_fabric
from featurecache.joint.samples import Samples, choose_samples, from_progress, write_failures
from featurecache.joint.save import save_bodies, tuned_recipes
from featurecache.joint.schedule import make_phases
from featurecache.joint.start import Start, prepare
from featurecache.progress import Reporter, Silent
from featurecache.results import finish_run, write_results
from featurecache.run import Run, RunWriter, default_run_path, load_run
from featurecache.rundir import RECORD

FINISHED = f".{FOLDER}"  # hidden names are not part of a run: checkpoints stay until the run is published
# What may differ between an attempt and the one that resumes it. Of files the content counts, and is compared.
FREE = ("out", "overwrite", "resume", "device", "precision", "workers", "bootstrap", "manifest", "root", "init",
        "body", "weights", "trust_factory")  # fmt: skip


def finetune_joint(config: JointConfig, *, command: str = "", reporter: Reporter | None = None) -> Run:
    """Train bodies and head as one network.

    Bodies are frozen for `freeze_epochs`, in which the head alone learns through them; then everything learns for
    `epochs`, each phase with a one-cycle schedule of its own. The weights with the lowest validation loss are kept; a
    warm start (`init`) is judged before its first step too, so that training can't end worse than it began.

    Args:
        config: what to train on, from what, and how.
        command: the command line, for the record.
        reporter: told of progress.

    Returns:
        The run; its record lists `failed` samples, which are also in failures.csv.

    Raises:
        InputError: the configuration, the manifest, the split or the run to start from is not valid.
        RunError: the run to start from, or the checkpoint to resume from, is damaged.
        FeatureCacheError: no image can be read, or the loss is not finite.
        LockedError: another process is writing this run.
    """
    reporter = reporter or Silent()
    _check(config)
    finished = finished_run(config)
    if finished is not None:
        reporter.note(f"{config.out}: finished already, nothing to resume")
        return finished
    start = prepare(config)
    config = start.config
    out = config.out or default_run_path(start.manifest.path.stem, config.target, "joint")
    with RunWriter(out, kind="joint", overwrite=config.overwrite, resume=config.resume) as writer:
        kept = writer.path / FINISHED
        if kept.is_dir():  # killed while publishing
            shutil.rmtree(writer.path / FOLDER, ignore_errors=True)
            kept.rename(writer.path / FOLDER)
        training = Training(start, writer.path, reporter)
        done, samples = training.run()
        record = training.write(done, samples)
        if (writer.path / FOLDER).is_dir():
            (writer.path / FOLDER).rename(kept)
        run = finish_run(writer, {**record, "command": command})
    shutil.rmtree(run.path / FINISHED, ignore_errors=True)
    return run


def finished_run(config: JointConfig) -> Run | None:
    """The run that `resume` would go on with, if it was finished: asked twice, the same command gives the same run."""
    if not config.resume or config.overwrite or config.out is None or not (config.out / RECORD).is_file():
        return None
    run = load_run(config.out)
    return run if run.kind == "joint" else None


def _check(config: JointConfig) -> None:
    """Refuse settings that can't be, before anything is read."""
    problems = []
    for name in ("epochs", "freeze_epochs", "clip", "weight_decay"):
        if getattr(config, name) < 0:
            problems.append(f"{name}={getattr(config, name)}: must not be negative")
    if config.epochs == 0 and config.freeze_epochs == 0:
        problems.append("epochs=0 and freeze_epochs=0: nothing would be trained")
    for name in ("lr", "body_lr"):
        if getattr(config, name) <= 0:
            problems.append(f"{name}={getattr(config, name)}: must be above 0")
    if not 0 <= config.view_dropout < 1:
        problems.append(f"view_dropout={config.view_dropout}: must be in [0, 1)")
    if config.batch_size != "auto" and config.batch_size < 2:
        problems.append(f"batch_size={config.batch_size}: must be at least 2, for the head's BatchNorm")
    if config.resume and config.out is None:
        problems.append("--resume needs --out: the name of the run to go on with")
    if problems:
        raise InputError.from_problems("finetune-joint: not valid", problems)


class Training:
    """One call of `finetune_joint`, between reading its input and publishing its run.

    Args:
        start: what to train.
        directory: of the run being written.
        reporter: told of progress.
    """

    def __init__(self, start: Start, directory: Path, reporter: Reporter) -> None:
        self.start, self.directory, self.reporter = start, directory, reporter
        self.config = config = start.config
        self.ids: list[str] = start.manifest.table["sample_id"].to_list()
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        self.workers = (os.cpu_count() or 1) if config.workers == "auto" else config.workers
        self.fabric = make_fabric(self.device, self.precision)
        self.settings = head_settings(config, start.head)
        self.images = SampleImages(
            start.manifest,
            start.setups,
            seed=config.seed,
            augmentation=Augmentation(config.augment) if config.augment else None,
            view_dropout=config.view_dropout,
        )
        self.fusion = make_fusion(config.fusion, start.blocks)

    def run(self) -> tuple[Progress, Samples]:
        """Train; the model ends with its best weights."""
        start, config = self.start, self.config
        samples = choose_samples(start, self.images, workers=self.workers, reporter=self.reporter)
        train, valid = samples.of("train"), samples.of("valid")
        if len(train) < 2:
            raise InputError(f"{len(train)} training samples: at least 2 are needed")
        target = start.target.subset(train)
        self.skipped = untrainable(target)
        self.model = self.make_model(target, missing=not samples.present[samples.splits == "train"].all())
        loss = HeadLoss(
            target, class_weight=self.settings.class_weight, label_smoothing=self.settings.label_smoothing
        ).to(self.device)
        groups = make_groups(self.model, start.setups, lr=config.lr, body_lr=config.body_lr)
        module = self.fabric.setup_module(self.model)
        preprocessings = {view: setup.preprocessing for view, setup in start.setups.items()}
        self.runner = Runner(self.fabric, module, preprocessings)
        plan = Plan(
            phases=make_phases(config.freeze_epochs, config.epochs),
            groups=groups,
            batch_size=batch_size(config, len(train)),
            workers=self.workers,
            seed=config.seed,
            clip=config.clip,
            weight_decay=config.weight_decay,
            judge_start=start.head is not None,
        )
        progress, optimizer = self.resume(samples)
        targets = target_tensor(start.target)
        loop = Loop(
            self.runner, self.model, loss, self.images, targets, train, valid, plan, self.directory, self.reporter
        )
        progress = loop.run(progress, optimizer)
        return progress, samples.without(from_progress(progress.failed))

    def make_model(self, target: Target, *, missing: bool) -> JointModel:
        """Bodies, fusion and head, as they are before the first step."""
        start, config = self.start, self.config
        self.head = make_head(
            start.head, self.fusion, target, self.settings,
            missing=missing, view_dropout=config.view_dropout, seed=config.seed,
        )  # fmt: skip
        return make_model(start.setups, self.fusion, self.head, multi=config.multi)

    def resume(self, samples: Samples) -> tuple[Progress, dict[str, Tensor]]:
        """Where an earlier attempt stands (its weights are put into the model), or a fresh start."""
        fingerprint = self.fingerprint(samples)
        found = load_state(self.directory) if self.config.resume else None
        if found is None:
            return Progress(fingerprint), {}
        progress, model, optimizer = found
        then = progress.fingerprint
        differing = sorted(name for name in {*fingerprint, *then} if fingerprint.get(name) != then.get(name))
        if differing:
            changes = (f"{name}: {then.get(name)!r} then, {fingerprint.get(name)!r} now" for name in differing)
            raise InputError(
                f"--resume: this is not the training that was interrupted: {'; '.join(changes)}. "
                "Give the same options, or --overwrite to start again."
            )
        try:
            self.model.load_state_dict(model)
        except RuntimeError as error:
            raise RunError(f"{self.directory}: the checkpoint does not fit the model: {error}") from None
        self.reporter.note(f"resumed after epoch {progress.epoch}")
        return progress, optimizer

    def fingerprint(self, samples: Samples) -> dict[str, Any]:
        """What has to be the same for a checkpoint to be gone on with; plain JSON."""
        options = {k: v for k, v in self.config.model_dump(mode="json").items() if k not in FREE}
        text = "\n".join(f"{self.ids[row]},{split}" for row, split in zip(samples.rows, samples.splits, strict=True))
        bodies = {view: [list(own) for own in setup.identities] for view, setup in self.start.setups.items()}
        head = self.config.init and hashlib.sha256((self.config.init / FCHead.file).read_bytes()).hexdigest()
        return {
            **options,
            "manifest": self.start.manifest.digest,
            "bodies": bodies,
            "head": head,
            "precision": self.precision,
            "samples and splits": hashlib.sha256(text.encode()).hexdigest(),
        }

    def write(self, progress: Progress, samples: Samples) -> dict[str, Any]:
        """Predict all samples and write everything but run.json; returns the record."""
        start, config = self.start, self.config
        self.reporter.begin("predict", len(samples.rows), "samples")
        rows, outputs, failed = self.runner.predict(
            self.images,
            samples.rows,
            batch_size=2 * batch_size(config, len(samples.of("train"))),
            workers=self.workers,
            advance=lambda n: self.reporter.advance("predict", n),
        )
        self.reporter.end("predict")
        samples = samples.without(failed)
        failures = write_failures(self.directory / "failures.csv", self.ids, samples.failed)
        target = start.target.subset(rows)
        self.model.to("cpu")
        head = FCHead.adopt(
            self.head, target, self.fusion.blocks, self.settings, skipped=self.skipped, seed=config.seed
        )
        head.save(self.directory)
        results = write_results(
            self.directory,
            target=target,
            scores=joint_scores(head, outputs),
            splits=samples.splits,
            groups=samples.groups,
            sample_ids=[self.ids[row] for row in rows],
            views=self.images.views,
            present=samples.present,
            history=progress.history,
            bootstrap=config.bootstrap,
            seed=config.seed,
        )
        return {
            "task": target.task,
            "classes": list(target.classes),
            "targets": list(target.names),
            "views": list(self.images.views),
            "recipes": tuned_recipes(start.setups),
            "bodies": save_bodies(self.directory, start.setups),
            "config": _plain(config),
            "body_config": {**_part(config, BodyConfig), "seed": start.seed},
            "manifest_config": _part(config, ManifestConfig),
            "target_config": _part(config, TargetConfig),
            "split": _part(config, SplitConfig),
            "tap": start.tap,
            "blocks": [block.to_json() for block in start.blocks],
            "fusion": config.fusion,
            "precision": self.precision,
            "skipped": list(self.skipped),
            "head": {"name": FCHead.name, "settings": self.settings.model_dump(mode="json")},
            "threshold": results.threshold,
            "binding": {"dataset": start.manifest.path.stem, "manifest_digest": start.manifest.digest},
            "best_epoch": progress.best_epoch,
            "failed": failures,
        }


def head_settings(config: JointConfig, head: FCHead | None) -> FCSettings:
    """The head's settings: those of the fitted head, changed where `settings` says so."""
    known = head.settings.model_dump() if head is not None else {}
    values = {**known, **config.settings, "view_dropout": config.view_dropout}
    return FCSettings.create(values, source="head 'fc'")


def batch_size(config: JointConfig, n: int) -> int:
    """Samples per step: as configured, else 32, or fewer where an epoch would have less than eight steps."""
    return config.batch_size if config.batch_size != "auto" else min(32, max(4, n // 8))


def _plain(config: BaseModel) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _part(config: JointConfig, part: type[BaseModel]) -> dict[str, Any]:
    values: Mapping[str, Any] = config.model_dump(mode="json")
    return {name: values[name] for name in part.model_fields}
