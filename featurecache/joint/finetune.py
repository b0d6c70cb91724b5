"""Joint fine-tuning from end to end: prepare, choose and split the samples, train, write the run."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from featurecache.bodies.engines import resolve_device, resolve_precision
from featurecache.config import BodyConfig, JointConfig, ManifestConfig, SplitConfig, TargetConfig
from featurecache.data.splits import group_column
from featurecache.data.targets import Target
from featurecache.errors import InputError, RunError
from featurecache.heads.base import untrainable
from featurecache.heads.fc import FCHead
from featurecache.heads.losses import target_tensor
from featurecache.joint.average import Average
from featurecache.joint.build import make_groups, make_model, rebuilt
from featurecache.joint.callbacks import Callback, Callbacks, HistoryFile, TensorBoard
from featurecache.joint.checkpoint import FOLDER, Progress, State, load_state, refuse_unfinished, telling_how
from featurecache.joint.finder import find_rate
from featurecache.joint.kinds import loss_of, module_of, say, settings_of
from featurecache.joint.loop import Loop
from featurecache.joint.model import JointModel
from featurecache.joint.pairing import paired
from featurecache.joint.parallel import Processes
from featurecache.joint.plan import Every, Plan
from featurecache.joint.prefix import check_weights, lower_identities
from featurecache.joint.runner import Runner, make_fabric
from featurecache.joint.samples import Samples, from_progress, write_failures
from featurecache.joint.save import save_bodies, tuned_recipes
from featurecache.joint.schedule import make_phases
from featurecache.joint.settings import REFERENCE_LR, batch_size, check, mixing, rates, with_defaults
from featurecache.joint.shown import samples_record, views_alone, write_shown
from featurecache.joint.sources import choose, normalisers, open_images, sample_ids
from featurecache.joint.start import Start, prepare
from featurecache.joint.step import Stepper
from featurecache.progress import Reporter, Silent
from featurecache.run import Run, RunWriter, default_run_path, load_run
from featurecache.rundir.files import RECORD
from featurecache.rundir.fitrecord import read_about
from featurecache.rundir.results import finish_run, write_results

FINISHED = f".{FOLDER}"  # hidden names are not part of a run: checkpoints stay until the run is published
# What may differ between an attempt and the one that resumes it. Of files the content counts, and is compared.
FREE = ("out", "overwrite", "resume", "device", "precision", "workers", "bootstrap", "manifest", "root", "init",
        "body", "weights", "trust_factory", "checkpoint_every", "checkpoint_activations", "compile",
        "tensorboard", "store", "images", "about")  # fmt: skip


def finetune_joint(
    config: JointConfig,
    *,
    command: str = "",
    reporter: Reporter | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train bodies and head as one network.

    Bodies are frozen for `freeze_epochs`, in which the head alone learns through them; then everything learns for
    `epochs`, each phase with a one-cycle schedule of its own. The weights with the lowest validation loss are kept; a
    warm start (`init`) is judged before its first step too, so that training can't end worse than it began.
    Processes that torchrun started train together; only the first of them writes and reports.

    Args:
        config: what to train on, from what, and how.
        command: the command line, for the record.
        reporter: told of progress.
        callbacks: told of steps and epochs, beside history.csv.

    Returns:
        The run; its record lists `failed` samples, which are also in failures.csv.

    Raises:
        InputError: the configuration, the manifest, the split or the run to start from is not valid, or an unfinished
            training would be discarded.
        RunError: the run to start from, or the checkpoint to resume from, is damaged.
        FeatureCacheError: no image can be read, or the loss is not finite.
        LockedError: another process is writing this run.
    """
    reporter = reporter or Silent()
    check(config)
    config = with_defaults(config)
    device = resolve_device(config.device)
    fabric = make_fabric(device, resolve_precision(config.precision, device), together=True)
    processes = Processes(fabric)
    if processes.rank == 0 and config.out is not None and not (config.resume or config.overwrite):
        refuse_unfinished(config.out)
    finished = finished_run(config) if processes.rank == 0 else None
    if processes.same(finished is not None):
        reporter.note(f"{config.out}: finished already, nothing to resume")
        return finished or load_run(config.out or "")
    start = paired(prepare(config)) if config.pairs else prepare(config)
    config = start.config
    out = processes.same(config.out or default_run_path(start.manifest.path.stem, config.target, "joint"))
    if processes.rank:
        with closing(Training(start, fabric, None, Silent())) as training:
            training.run()
        processes.wait()
        return load_run(out)
    how = "--resume" if config.out else f"--out {out} --resume"
    with (
        RunWriter(out, kind="joint", overwrite=config.overwrite, resume=config.resume) as writer,
        telling_how(writer.path, how),
    ):
        kept = writer.path / FINISHED
        if kept.is_dir():  # killed while publishing
            shutil.rmtree(writer.path / FOLDER, ignore_errors=True)
            kept.rename(writer.path / FOLDER)
        with closing(Training(start, fabric, writer.path, reporter)) as training:
            done, samples = training.run(callbacks)
            record = training.write(writer.path, done, samples)
        if (writer.path / FOLDER).is_dir():
            (writer.path / FOLDER).rename(kept)
        run = finish_run(writer, {**record, "command": command})
    shutil.rmtree(run.path / FINISHED, ignore_errors=True)
    processes.wait()
    return run


def finished_run(config: JointConfig) -> Run | None:
    """The run that `resume` would go on with, if it was finished: asked twice, the same command gives the same run."""
    if not config.resume or config.overwrite or config.out is None or not (config.out / RECORD).is_file():
        return None
    run = load_run(config.out)
    return run if run.kind == "joint" else None


class Training:
    """One call of `finetune_joint`, between reading its input and publishing its run.

    Args:
        start: what to train.
        fabric: of this process.
        directory: of the run being written; None for all processes but the first.
        reporter: told of progress.
    """

    def __init__(self, start: Start, fabric: Any, directory: Path | None, reporter: Reporter) -> None:
        self.start, self.fabric, self.directory, self.reporter = start, fabric, directory, reporter
        self.processes = Processes(fabric)
        self.config = config = start.config
        self.precision = resolve_precision(config.precision, fabric.device)
        self.workers = (os.cpu_count() or 1) if config.workers == "auto" else config.workers
        self.settings = settings_of(start)
        read_about(config.about)  # refused before hours of training
        self.images = open_images(start, self.processes, reporter)

    def close(self) -> None:
        """Close what training read from."""
        self.images.close()

    def run(self, callbacks: Sequence[Callback] = ()) -> tuple[Progress, Samples]:
        """Train; the model of the first process ends with its best weights."""
        start, config = self.start, self.config
        samples = self.choose()
        self.ids = sample_ids(start, self.images, samples)
        train, valid = samples.of("train"), samples.of("valid")
        if len(train) < 2:
            raise InputError(f"{len(train)} training samples: at least 2 are needed")
        target = start.target.subset(train)
        self.skipped = untrainable(target)
        self.model = self.make_model(target, missing=not samples.present[samples.splits == "train"].all())
        loss = loss_of(target, self.settings).to(self.fabric.device)
        plan = self.plan(len(train))
        module = self.fabric.setup_module(self.model)
        self.runner = Runner(self.fabric, module, normalisers(start))
        state = self.resume(samples)
        average = Average(self.model, config.ema) if config.ema else None
        callback = Callbacks(self.callbacks(callbacks))
        try:
            stepper = Stepper(self.runner, self.processes, loss, target_tensor(start.target), plan)
            loop = Loop(
                stepper, self.model, self.images, train, valid, plan, self.directory, self.reporter, callback, average
            )
            with rebuilt(self.model, recompute=config.checkpoint_activations, compiles=config.compile):
                if config.lr == "find":
                    state = self.find_rate(loop, state)
                progress = loop.run(state)
        finally:
            callback.close()
        return progress, samples.without(from_progress(progress.failed))

    def choose(self) -> Samples:
        """The samples that take part; the first process reads them all and tells the others."""
        found = None
        if self.processes.rank == 0:
            found = choose(self.start, self.images, workers=self.workers, reporter=self.reporter)
        samples: Samples = self.processes.same(found)  # type: ignore[assignment]
        if self.processes.rank:
            for failure in samples.failed:
                self.images.leave_out(failure)
        return samples

    def plan(self, n: int) -> Plan:
        """How to train on `n` samples."""
        config = self.config
        lr, body_lr = rates(config)
        return Plan(
            phases=make_phases(config.freeze_epochs or 0, config.epochs, gradual=config.unfreeze == "gradual"),
            groups=make_groups(self.model, self.start.setups, lr=lr, body_lr=body_lr),
            batch_size=batch_size(config, n, self.processes.count),
            workers=self.workers,
            seed=config.seed,
            clip=config.clip,
            weight_decay=config.weight_decay,
            judge_start=self.start.head is not None,
            accumulate=config.accumulate,
            warm_up=config.warm_up,
            patience=config.patience,
            mixing=mixing(config),
            every=Every.parse(config.checkpoint_every),
            least=2 if self.settings.batch_norm else 1,
        )

    def find_rate(self, loop: Loop, state: State) -> State:
        """Set the rates to what the finder suggests, or suggested before the training was interrupted."""
        rate = state.progress.lr
        if rate is None:
            curve = find_rate(loop)
            rate = curve.suggestion
            if self.directory is not None:
                curve.write(self.directory)
            self.reporter.note(f"learning rate {rate:.2g}, as the finder suggests (lr_find.png)")
        loop.plan = replace(loop.plan, groups=loop.plan.groups.scaled(rate / REFERENCE_LR))
        return replace(state, progress=replace(state.progress, lr=rate))

    def callbacks(self, given: Sequence[Callback]) -> list[Callback]:
        """Those of the user and our own; none in a process that does not write."""
        if self.directory is None:
            return []
        own: list[Callback] = [HistoryFile(self.directory)]
        if self.config.tensorboard:
            own.append(TensorBoard(self.directory))
        return [*own, *given]

    def make_model(self, target: Target, *, missing: bool) -> JointModel:
        """Bodies and head, as they are before the first step."""
        start, config = self.start, self.config
        self.head = module_of(start, target, self.settings, missing=missing)
        return make_model(
            start.setups, start.blocks, self.head, multi=config.multi, uppers=start.uppers,
            layout=torch.contiguous_format if config.detach else torch.channels_last,  # detached: as stage one has it
        )  # fmt: skip

    def resume(self, samples: Samples) -> State:
        """Where an earlier attempt stands (its weights are put into the model), or a fresh start."""
        fingerprint = self.fingerprint(samples)
        found = load_state(self.directory) if self.config.resume and self.directory is not None else None
        found = self.processes.same(found)
        if found is None:
            self.processes.same_weights(self.model)
            return State(Progress(fingerprint))
        then = found.progress.fingerprint
        differing = sorted(name for name in {*fingerprint, *then} if fingerprint.get(name) != then.get(name))
        if differing:
            changes = (f"{name}: {then.get(name)!r} then, {fingerprint.get(name)!r} now" for name in differing)
            raise InputError(
                f"--resume: this is not the training that was interrupted: {'; '.join(changes)}. "
                "Give the same options, or --overwrite to start again."
            )
        try:
            self.model.load_state_dict(found.model)
        except RuntimeError as error:
            raise RunError(f"{self.directory}: the checkpoint does not fit the model: {error}") from None
        step = found.progress.within.get("step")
        self.reporter.note(f"resumed after epoch {found.progress.epoch}{f' and {step} steps' if step else ''}")
        return found

    def fingerprint(self, samples: Samples) -> dict[str, Any]:
        """What has to be the same for a checkpoint to be gone on with; plain JSON."""
        options = {k: v for k, v in self.config.model_dump(mode="json").items() if k not in FREE}
        text = "\n".join(f"{self.ids[row]},{split}" for row, split in zip(samples.rows, samples.splits, strict=True))
        bodies = {view: [list(own) for own in setup.identities] for view, setup in self.start.setups.items()}
        head = self.config.init and hashlib.sha256((self.config.init / FCHead.file).read_bytes()).hexdigest()
        dense = self.start.masks is not None
        return {
            **options,
            "manifest": self.start.manifest.digest,
            "bodies": bodies,
            "head": head,
            **({"masks": hashlib.sha256(self.start.target.values.tobytes()).hexdigest()} if dense else {}),
            "precision": self.precision,
            "processes": self.processes.count,
            "samples and splits": hashlib.sha256(text.encode()).hexdigest(),
        }

    def write(self, directory: Path, progress: Progress, samples: Samples) -> dict[str, Any]:
        """Predict all samples and write everything but run.json; returns the record."""
        start, config = self.start, self.config
        self.reporter.begin("predict", len(samples.rows), "samples")
        size = 2 * batch_size(config, len(samples.of("train")), self.processes.count)
        said = say(
            start, self.runner, self.images, self.head, self.settings, samples, directory=directory, ids=self.ids,
            skipped=self.skipped, batch_size=size, workers=self.workers,
            advance=lambda n: self.reporter.advance("predict", n),
        )  # fmt: skip
        self.reporter.end("predict")
        head, target = said.head, said.target
        samples = samples.without(said.failed)
        failures = write_failures(directory / "failures.csv", self.ids, samples.failed)
        single = {}
        if isinstance(head, FCHead):
            single = views_alone(start, self.runner, self.images, head, samples, batch_size=size, workers=self.workers)
        self.model.to("cpu")
        if start.uppers:
            check_weights(start, lower_identities(start))
        head.save(directory)
        results = write_results(
            directory,
            target=target,
            scores=said.scores,
            masks=said.masks,
            splits=samples.splits,
            groups=samples.groups,
            sample_ids=[self.ids[row] for row in said.rows],
            views=self.images.views,
            present=samples.present,
            history=progress.history,
            bootstrap=config.bootstrap,
            seed=config.seed,
        )
        write_shown(directory, start, self.images, results, single)
        return {
            **samples_record(start, self.images, samples),
            "task": target.task,
            "classes": list(target.classes),
            "targets": list(target.names),
            "views": list(self.images.views),
            "recipes": tuned_recipes(start.setups),
            "bodies": save_bodies(directory, start.setups),
            "config": _plain(config),
            "body_config": {**_part(config, BodyConfig), "seed": start.seed},
            "manifest_config": _part(config, ManifestConfig),
            "target_config": _part(config, TargetConfig),
            "split": {
                **(start.division or _part(config, SplitConfig)),
                "group": group_column(start.manifest.table, config.group),
            },
            "tap": start.tap,
            "blocks": [block.to_json() for block in start.blocks],
            "fusion": config.fusion,
            "precision": self.precision,
            "skipped": list(self.skipped),
            "head": {"name": head.name, "settings": self.settings.model_dump(mode="json")},
            "threshold": results.threshold,
            "binding": {"dataset": start.manifest.path.stem, "manifest_digest": start.manifest.digest},
            "best_epoch": progress.best_epoch,
            "seconds_fit": round(sum(row["seconds"] for row in progress.history), 3),
            "failed": failures,
        }


def _plain(config: BaseModel) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _part(config: JointConfig, part: type[BaseModel]) -> dict[str, Any]:
    values: Mapping[str, Any] = config.model_dump(mode="json")
    return {name: values[name] for name in part.model_fields}
