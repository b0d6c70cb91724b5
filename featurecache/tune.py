"""Searches a head's settings on validation samples, resumably; the best of them become a normal run.

Trials go through Optuna (extra `tune`): a tree-structured Parzen estimator proposes settings, a median rule ends trials
that fall behind. Every trial reads the same features, held in RAM once where they fit. Test samples are scored once, by
the run that is made in the end; with `cv` the search happens within each fold (nested), so that the figures of the
folds are of settings that have not seen them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.config import FitConfig
from featurecache.crossval import cross_validate
from featurecache.data.targets import Target
from featurecache.dataset import FeatureDataset
from featurecache.division import divide
from featurecache.errors import DependencyError, FeatureCacheError, InputError
from featurecache.evaluation.metrics import compute_metrics
from featurecache.evaluation.threshold import choose_threshold
from featurecache.evaluation.verdict import goodness, ranking_metric
from featurecache.features.features import ArrayFeatures, Features
from featurecache.fit import HeadRun, fit_once, open_dataset, torch_device, training_fold
from featurecache.heads.base import Fold, Head, get_head
from featurecache.heads.space import Span
from featurecache.machine.interrupts import Held, held_back
from featurecache.machine.memory import free_memory
from featurecache.progress import Reporter, Silent
from featurecache.run import default_run_path
from featurecache.rundir.fitrecord import Beside, target_of

STARTUP = 10  # random trials before the estimator proposes, and trials to the end before the median rule ends any
WARM_STEPS = 5  # epochs or rounds in which no trial is ended


@dataclass
class Search:
    """One search of settings: what is fixed, and where the trials are kept.

    Attributes:
        dataset: with a target.
        features: its features, in RAM where they fit.
        head: name of the head.
        fixed: settings that are not searched.
        metric: by which trials are ranked, on validation.
        trials: how many, counting those that an earlier attempt finished.
        storage: the file that keeps them, a line of JSON per event.
        seed: of proposals and heads.
        device: where heads compute.
        jobs: trials at a time.
        found: division -> all its trials, as in trials.csv.
    """

    dataset: FeatureDataset
    features: Features
    head: str
    fixed: Mapping[str, Any]
    metric: str
    trials: int
    storage: Path
    seed: int
    device: str
    jobs: int
    reporter: Reporter
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)
    _held: Held = field(default_factory=Held)

    def best(self, splits: NDArray[np.str_], called: str) -> dict[str, Any]:
        """The settings that reach the most on the validation rows of a division; its test rows are not looked at.

        Raises:
            InputError: the storage holds trials of other data, or the division has no validation rows.
            FeatureCacheError: no trial came to an end.
        """
        optuna = import_optuna()
        rows = {side: np.flatnonzero(splits == side).astype(np.int64) for side in ("train", "valid")}
        if not len(rows["valid"]):
            raise InputError("tuning needs validation samples: give --valid a share, or mark some in the split column")
        study = self._study(optuna, rows, called)
        ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        before = len(study.get_trials(deepcopy=False, states=ended))
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + before, n_startup_trials=STARTUP)
        task = f"tune {self.head}" if called == "final" else f"tune {self.head}, {called}"
        self.reporter.begin(task, max(0, self.trials - before), "trials")

        def told(study: Any, trial: Any) -> None:
            if len(study.get_trials(deepcopy=False, states=ended)) >= self.trials:
                study.stop()  # another process has added to the same storage
            with self._lock:
                best = _best_value(study)
                shown = "" if best is None else f"best {self.metric} {goodness(self.metric, best):.4f}"
                self.reporter.advance(task, 1, status=shown)

        try:
            if before < self.trials:
                # Ctrl-C would wait for the trials of other threads to end by themselves: they are told.
                with held_back() if self.jobs > 1 else contextlib.nullcontext(self._held) as self._held:
                    study.optimize(
                        lambda trial: self._try(optuna, trial, rows), n_trials=self.trials - before, n_jobs=self.jobs,
                        callbacks=[told],
                    )  # fmt: skip
        finally:
            self.reporter.end(task)
        self.found[called] = [self._row(called, trial) for trial in study.get_trials(deepcopy=False, states=ended)]
        if _best_value(study) is None:
            raise FeatureCacheError(
                f"{task}: none of {self.trials} trials came to an end with a defined {self.metric}; "
                "see whether the validation samples show both sides"
            )
        return {**self.fixed, **self._proposed(optuna.trial.FixedTrial(study.best_params), get_head(self.head))}

    def _study(self, optuna: Any, rows: Mapping[str, NDArray[np.int64]], called: str) -> Any:
        """The study of a division: made, or found with its trials."""
        about = {
            "head": self.head, "metric": self.metric,
            "fixed": json.dumps(dict(self.fixed), sort_keys=True, default=str),
            "data": self.dataset.binding.digest,
            "recipes": json.dumps({view: recipe.digest for view, recipe in sorted(self.dataset.recipes.items())}),
            "blocks": json.dumps([block.to_json() for block in self.dataset.blocks]),
            "rows": hashlib.sha256(rows["train"].tobytes() + b"|" + rows["valid"].tobytes()).hexdigest(),
            "target": _digest(target_of(self.dataset)),
            "replicas": json.dumps(replicas.to_json() if (replicas := self.dataset.replicas) is not None else None),
            "seed": self.seed,
        }  # fmt: skip
        storage = open_storage(optuna, self.storage)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=WARM_STEPS)
        study = optuna.create_study(
            storage=storage, study_name=called, direction="maximize", pruner=pruner, load_if_exists=True
        )
        held = study.user_attrs.get("about")
        if held is None:
            study.set_user_attr("about", about)
        elif unlike := [name for name, value in about.items() if held.get(name) != value]:
            raise InputError(
                f"{self.storage}: holds trials that differ in {', '.join(unlike)}, so they can't be gone on with. "
                "Give another --out or --storage, or remove the file."
            )
        return study

    def _try(self, optuna: Any, trial: Any, rows: Mapping[str, NDArray[np.int64]]) -> float:
        """Fit one head and measure it on validation."""
        self._held.check()
        kind = get_head(self.head)
        settings = {**self.fixed, **self._proposed(trial, kind)}
        head = kind(settings, seed=self.seed, device=self.device, memory=self.dataset.memory)
        target = target_of(self.dataset)
        train = training_fold(self.dataset, rows["train"], self.features)
        valid = Fold(self.features, rows["valid"], target.subset(rows["valid"]))
        step = 0

        def watch(row: Mapping[str, Any]) -> None:
            nonlocal step
            step += 1
            self._held.check()
            loss = row.get("valid_loss")
            if isinstance(loss, float) and np.isfinite(loss):
                trial.report(-loss, step)
                if trial.should_prune():
                    raise optuna.TrialPruned

        start = time.perf_counter()
        head.fit(train, valid, progress=watch)
        scores = head.score_rows(self.features, rows["valid"])
        trial.set_user_attr("seconds", round(time.perf_counter() - start, 3))
        cut = choose_threshold(valid.target, scores)["value"]
        figure = compute_metrics(valid.target, scores, threshold=cut)[self.metric]
        if figure is None or not np.isfinite(figure):
            raise optuna.TrialPruned
        return goodness(self.metric, float(figure))

    def _proposed(self, trial: Any, kind: type[Head]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, where in kind.search_space.items():
            if name in self.fixed:
                continue
            if not isinstance(where, Span):
                named = {str(value): value for value in where.values}
                found[name] = named[trial.suggest_categorical(name, list(named))]
            elif where.whole:
                found[name] = trial.suggest_int(name, int(where.low), int(where.high), log=where.log)
            else:
                found[name] = trial.suggest_float(name, where.low, where.high, log=where.log)
        return found

    def _row(self, called: str, trial: Any) -> dict[str, Any]:
        value = None if trial.value is None else goodness(self.metric, trial.value)
        return {
            "division": called, "trial": trial.number, "state": trial.state.name.lower(), f"valid_{self.metric}": value,
            "seconds": trial.user_attrs.get("seconds"), **trial.params,
        }  # fmt: skip

    def table(self) -> str:
        """trials.csv: a row per trial of every division."""
        rows = [row for of_division in self.found.values() for row in of_division]
        text = io.StringIO()
        pl.DataFrame(rows, infer_schema_length=None).write_csv(text)
        return text.getvalue()


def tune(
    config: FitConfig,
    *,
    trials: int = 50,
    metric: str | None = None,
    storage: Path | None = None,
    jobs: int = 1,
    command: str = "",
    reporter: Reporter | None = None,
) -> tuple[HeadRun, Search]:
    """Search the settings of a head that are not given, then fit it with the best and write a run.

    Args:
        config: as for `fit-head`; its `settings` are not searched. With `cv` the search is nested in the folds.
        trials: how many in all; those of an earlier, unfinished attempt count.
        metric: by which they are ranked on validation; default AUROC, for several classes accuracy, for numbers R2.
        storage: the file that keeps the trials; default `<out>.trials.jsonl`.
        jobs: trials at a time.
        command: recorded in the run.
        reporter: told of each trial.

    Returns:
        The run, with trials.csv in it, and the search.

    Raises:
        InputError: Optuna is not installed, nothing to search, trials of other data in the storage; see `fit_head`.
    """
    import_optuna()
    reporter = reporter or Silent()
    space = get_head(config.head).search_space
    if not set(space) - set(config.settings):
        why = "it says of no setting where to search" if not space else "--set fixes all that could be searched"
        raise InputError(f"head {config.head!r}: nothing to tune: {why}")
    dataset = open_dataset(config)
    target = target_of(dataset)
    out = config.out or default_run_path(dataset.binding.name, target.names, config.head)
    if out.exists() and not config.overwrite:
        raise InputError(f"{out}: already exists. Give another name to --out, or --overwrite to replace it.")
    # Without --out the next run gets the next number; its trials are kept under the name without one.
    stem = out.name if config.out else out.name.rpartition("-")[0]
    kept = storage or out.with_name(f"{stem}.trials.jsonl")
    search = Search(
        dataset, in_memory(dataset), config.head, config.settings, ranking_metric(target.task, metric), trials, kept,
        config.seed, torch_device(config.device), jobs, reporter,
    )  # fmt: skip
    about = {
        "tuning": {"trials": trials, "metric": search.metric, "chosen_on": "valid", "nested": config.cv is not None}
    }
    own = config.model_dump(mode="json", exclude_none=True)
    beside = Beside(command, own, about, files=lambda: {"trials.csv": search.table()})
    wanted = config.model_copy(update={"out": out})
    if config.cv is not None:
        return cross_validate(dataset, config.cv, wanted, beside, choose=search.best, reporter=reporter), search
    splits = divide(dataset, config)
    wanted = wanted.model_copy(update={"settings": search.best(splits, "final")})
    return fit_once(dataset, wanted, beside, reporter=reporter), search


def in_memory(dataset: FeatureDataset) -> Features:
    """The features as one array where they fit into the budget, half of what is free by default, else as they are."""
    rows, columns = dataset.features.shape
    if 4 * rows * columns > (free_memory() // 2 if dataset.memory is None else dataset.memory):
        return dataset.features
    return ArrayFeatures(dataset.numpy()[0], dataset.blocks)


def import_optuna() -> Any:
    """Optuna, quiet.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise DependencyError("tuning needs Optuna: pip install 'featurecache[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def open_storage(optuna: Any, path: Path) -> Any:
    """The trials in a file, which is made; a last line that a crash left unfinished is taken away.

    Raises:
        InputError: it is no such file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise InputError(f"{path}: a folder; trials are kept in a file")
    journal, where = optuna.storages.journal, os.path.abspath(path)  # a dead process's lock on a relative path is kept
    if _unfinished(path) is not None:
        lock = journal.JournalFileSymlinkLock(where)
        lock.acquire()  # then it is no line that another process is writing
        try:
            if (kept := _unfinished(path)) is not None:
                os.truncate(path, kept)
        finally:
            lock.release()
    try:
        if path.exists():
            for line in path.read_bytes().rpartition(b"\n")[0].splitlines():
                json.loads(line)  # Optuna minds a line that is none only once others follow
        return optuna.storages.JournalStorage(journal.JournalFileBackend(where))
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a file of trials. Give another --storage, or remove it.") from None


def _unfinished(path: Path) -> int | None:
    """Bytes of whole lines where the last one lacks its end."""
    held = path.read_bytes() if path.exists() else b""
    return None if held.endswith(b"\n") or not held else held.rfind(b"\n") + 1


def _digest(target: Target) -> str:
    """Of the names, classes and values of all samples."""
    about = json.dumps([target.task, list(target.names), list(target.classes)])
    return hashlib.sha256(about.encode() + b"|" + np.ascontiguousarray(target.values).tobytes()).hexdigest()


def _best_value(study: Any) -> float | None:
    with contextlib.suppress(ValueError):  # no trial has ended
        return float(study.best_value)
    return None
