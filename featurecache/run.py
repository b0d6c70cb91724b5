"""A run directory: written beside its final place and published by one rename; read back only if every hash agrees."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import polars as pl

from featurecache.errors import InputError, LockedError, MissingFileError, did_you_mean
from featurecache.rundir.densepredictions import Predictions, read_predictions
from featurecache.rundir.files import (
    LOCK,
    RECORD,
    SCHEMA,
    Kind,
    check_files,
    exchange,
    lock_file,
    own_files,
    read_record,
    sha256_file,
    sync,
)
from featurecache.rundir.predictions import read_text
from featurecache.rundir.record import dump_json, locate_bodies, package_version, plain_record, versions

_active: set[Path] = set()  # lockf does not exclude writers of the same process


def default_run_path(dataset: str, target: str | Sequence[str], head: str, *, parent: str | Path = "runs") -> Path:
    """The first free `runs/<dataset>-<target>-<head>-<n>`; more than three targets are counted, not listed."""
    names = [target] if isinstance(target, str) else list(target)
    label = "+".join(names) if len(names) <= 3 else f"{len(names)}targets"
    stem = "-".join(re.sub(r"[^\w.+]+", "_", part).strip("._") or "_" for part in (dataset, label, head))
    number = 1
    while (path := Path(parent) / f"{stem}-{number}").exists() or path.with_name(path.name + ".tmp").exists():
        number += 1
    return path


class RunWriter:
    """Writes a run into `RUN.tmp` and publishes it with one rename, so that no reader ever sees half a run.

    Use it as a context manager: leaving the block without `publish` removes what was written, unless the run is a joint
    one with files to resume from.

    Attributes:
        target: where the run will be.
        path: where to write now.
        resumed: whether `path` holds files of an earlier, unfinished attempt.

    Raises:
        InputError: `path` exists and neither `overwrite` nor an unfinished run to `resume` allows it, or it is no run.
        LockedError: another process is writing this run.
    """

    def __init__(self, path: str | Path, *, kind: Kind, overwrite: bool = False, resume: bool = False) -> None:
        self.target, self.kind, self.overwrite = Path(os.path.abspath(path)), kind, overwrite
        self._shown = str(path)
        if self.target == Path(self.target.anchor):
            raise InputError(f"{path}: not a name for a run directory. Give --out a new name such as runs/first.")
        self.path = self.target.with_name(self.target.name + ".tmp")
        self._old = self.target.with_name(self.target.name + ".old")
        self.published = False
        if self._old.exists() and not self.target.exists():  # killed between the two renames of an overwrite
            self._old.rename(self.target)
        self._check_target(resume)
        self._lock = self._acquire()
        try:
            self._check_target(resume)  # the writer that we waited for may have published by now
            leftovers = own_files(self.path)
            self.resumed = resume and bool(leftovers)
            if not resume:
                for child in self.path.iterdir():
                    if child.name != LOCK:
                        shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
        except BaseException:
            self._release()
            raise

    def _check_target(self, resume: bool) -> None:
        if not os.path.lexists(self.target):
            return
        if resume and not self.overwrite:
            raise InputError(
                f"{self._shown}: this run is finished, there is nothing to resume. Use it as it is, "
                "give --overwrite to replace it, or another name to --out."
            )
        if not self.overwrite:
            raise InputError(
                f"{self._shown}: already exists. Give another name to --out, or --overwrite to replace it."
            )
        if not (self.target / RECORD).is_file() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise InputError(
                f"{self._shown}: exists and is not a run (it holds no {RECORD}), so --overwrite leaves it alone."
            )

    def _acquire(self) -> IO[bytes]:
        if self.path in _active:
            raise LockedError(f"{self._shown}: this process is already writing it.", pid=os.getpid())
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock = (self.path / LOCK).open("a+b")
            except FileNotFoundError:  # published by another writer just now
                continue
            try:
                lock_file(lock)
            except OSError:
                lock.seek(0)
                pid = int(re.sub(rb"\D", b"", lock.read(20)) or b"0")
                lock.close()
                message = f"{self._shown}: process {pid or '?'} is writing it now. Wait, or give another name to --out."
                raise LockedError(message, pid=pid) from None
            try:
                same = os.path.samestat(os.fstat(lock.fileno()), (self.path / LOCK).stat())
            except FileNotFoundError:
                same = False
            if same:
                break
            lock.close()
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        lock.flush()
        _active.add(self.path)
        return lock

    def _release(self) -> None:
        _active.discard(self.path)
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the directory; without `publish` it is removed, unless it is a joint run's and holds files."""
        if self.path not in _active:
            return
        if not self.published and not (self.kind == "joint" and own_files(self.path)):
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def complete(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """`record` as it will stand in run.json, without the file hashes: plain JSON, portable paths, versions."""
        head = {"schema": SCHEMA, "kind": self.kind, "featurecache": package_version()}
        body = {name: value for name, value in record.items() if name not in (*head, "files")}
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return plain_record({**head, "created": created, "versions": versions(), **body}, self.target.parent)

    def publish(self, record: Mapping[str, Any]) -> Run:
        """Write run.json with the SHA-256 of every other file, and rename the directory to its final name.

        Args:
            record: task, classes, targets, views, recipes, config, and whatever else is to be kept; the number of the
                format, kind, version, date, library versions and `files` are added.
        """
        files = {name: sha256_file(path) for name, path in own_files(self.path).items()}
        (self.path / RECORD).write_text(dump_json({**self.complete(record), "files": files}), encoding="utf-8")
        for name in (*files, RECORD):
            sync(self.path / name)
        for folder in sorted({(self.path / name).parent for name in (*files, RECORD)}):
            sync(folder)
        if os.name == "nt":  # an open file would pin the directory's name
            self._lock.close()
        if os.path.lexists(self.target):
            self._replace()
        else:
            self.path.rename(self.target)
        (self.target / LOCK).unlink(missing_ok=True)
        sync(self.target.parent)
        self.published = True
        self.close()
        return load_run(self.target)

    def _replace(self) -> None:
        """Put the new run where an old one stands; in one step where the system can exchange two names."""
        if exchange(self.path, self.target):
            shutil.rmtree(self.path)
            return
        shutil.rmtree(self._old, ignore_errors=True)
        self.target.rename(self._old)
        self.path.rename(self.target)
        shutil.rmtree(self._old)


class Run:
    """A published run, read-only.

    Attributes:
        path: its directory.
        record: run.json as it stands.
    """

    def __init__(self, path: str | Path, record: Mapping[str, Any]) -> None:
        self.path, self.record = Path(path), dict(record)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, kind={self.kind!r}, task={self.task!r})"

    @property
    def kind(self) -> str:
        """`head` (fitted on cached features) or `joint` (bodies and head together)."""
        return str(self.record["kind"])

    @property
    def version(self) -> str:
        """The featurecache version that wrote the run."""
        return str(self.record["featurecache"])

    @property
    def task(self) -> str:
        """Binary, multiclass, multilabel or regression."""
        return str(self.record["task"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Class labels in the order of the probability columns; empty for multilabel and regression."""
        return tuple(map(str, self.record["classes"]))

    @property
    def targets(self) -> tuple[str, ...]:
        """The target columns."""
        return tuple(map(str, self.record["targets"]))

    @property
    def views(self) -> tuple[str, ...]:
        """The views that the model reads, in the order of its features."""
        return tuple(map(str, self.record["views"]))

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the stage that made the run, as plain values."""
        return dict(self.record["config"])

    @property
    def command(self) -> str:
        """The command line, without absolute paths; empty for a run made from Python."""
        return str(self.record.get("command") or "")

    @property
    def recipes(self) -> dict[str, dict[str, Any]]:
        """Per view the `recipe` of the features that the model takes, and its `digest`."""
        return {view: dict(recipe) for view, recipe in self.record["recipes"].items()}

    @property
    def bodies(self) -> dict[str, dict[str, Any]]:
        """Per view the tuned body of a joint run; empty for a head run."""
        return {view: dict(body) for view, body in (self.record.get("bodies") or {}).items()}

    @property
    def threshold(self) -> dict[str, Any] | None:
        """`value`, `rule` and `chosen_on` of the decision threshold, or None where the task has none."""
        return dict(self.record["threshold"]) if self.record.get("threshold") else None

    @property
    def binding(self) -> dict[str, Any]:
        """`dataset` and `digest` of the binding that it was fitted on."""
        return dict(self.record.get("binding") or {})

    @property
    def body_config(self) -> dict[str, Any]:
        """Options of `BodyConfig` per view, and `seed`; files and runs that they name are given where they lie now."""
        return locate_bodies(self.record.get("body_config") or {}, Path(os.path.abspath(self.path)).parent)

    @property
    def files(self) -> dict[str, str]:
        """Relative name -> SHA-256 of every file of the run but run.json."""
        return dict(self.record["files"])

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """metrics.json: `run.metrics["test"]["roc_auc"]`."""
        return dict(json.loads((self.path / "metrics.json").read_text(encoding="utf-8")))

    @cached_property
    def predictions(self) -> pl.DataFrame:
        """predictions.csv: ids, groups and classes as text, probabilities, regression values, pixels as float64."""
        table = read_text(self.path / "predictions.csv")
        kinds = {"regression": r"(target|prediction)(:|$)", "dense": "(pixels|said|right|iou|dice):"}
        floats = [name for name in table.columns if re.match(kinds.get(self.task, "p:"), name)]
        return table.with_columns(pl.col(floats).cast(pl.Float64))

    @cached_property
    def arrays(self) -> Predictions:
        """predictions.csv as arrays: true values, scores, ids, groups, splits."""
        return read_predictions(self.path, self.record)

    @cached_property
    def history(self) -> pl.DataFrame:
        """One row per epoch or round; empty for a head that has none."""
        path = self.path / "history.csv"
        return pl.read_csv(path) if path.is_file() and path.stat().st_size > 1 else pl.DataFrame()

    def plot_roc(self, split: str = "test", *, label: str | None = None, ax: Any = None) -> Any:
        """ROC curve of one split.

        Args:
            split: train, valid or test.
            label: the class or target column; default the positive class, or all of them, each against the rest.
            ax: matplotlib axes to draw on; default a new pyplot figure.

        Returns:
            sklearn.metrics.RocCurveDisplay; a list of them on the same axes where several labels are drawn.

        Raises:
            InputError: the task, split or label has no such curve.
        """
        from sklearn.metrics import RocCurveDisplay

        return self._plot_curves(RocCurveDisplay, "plot_roc", split, label, ax)

    def plot_pr(self, split: str = "test", *, label: str | None = None, ax: Any = None) -> Any:
        """Precision-recall curve of one split; arguments as `plot_roc`, sklearn.metrics.PrecisionRecallDisplay."""
        from sklearn.metrics import PrecisionRecallDisplay

        return self._plot_curves(PrecisionRecallDisplay, "plot_pr", split, label, ax)

    def plot_confusion(
        self, split: str = "test", *, label: str | None = None, normalize: str | None = None, ax: Any = None
    ) -> Any:
        """Confusion matrix of one split at the decisions in predictions.csv.

        Args:
            split: train, valid or test.
            label: the target column of a multilabel run; default its first.
            normalize: None, 'true', 'pred' or 'all', as in scikit-learn.
            ax: matplotlib axes to draw on; default a new pyplot figure.

        Returns:
            sklearn.metrics.ConfusionMatrixDisplay.
        """
        from sklearn.metrics import ConfusionMatrixDisplay

        if self.task == "regression":
            raise InputError("plot_confusion: a regression run has no classes.")
        true, predicted, labels = "target", "prediction", list(self.classes)
        if self.task == "multilabel":
            label = self.targets[0] if label is None else self._known_label(label, self.targets)
            true, predicted, labels = f"target:{label}", f"prediction:{label}", ["0", "1"]
        rows = self.predictions.filter(split=split).drop_nulls([true, predicted])
        if rows.is_empty():
            raise InputError(f"plot_confusion: no sample of split {split!r} has a known target.")
        return ConfusionMatrixDisplay.from_predictions(
            rows[true].to_list(), rows[predicted].to_list(), labels=labels, normalize=normalize, ax=ax,
            xticks_rotation="vertical" if len(labels) > 4 else "horizontal",
        )  # fmt: skip

    def _known_label(self, label: str, labels: Sequence[str]) -> str:
        if label not in labels:
            raise InputError(
                f"label {label!r} is not one of this run.{did_you_mean(label, labels)} Known: {', '.join(labels)}."
            )
        return label

    def _plot_curves(self, display: Any, what: str, split: str, label: str | None, ax: Any) -> Any:
        if self.task == "regression":
            raise InputError(f"{what}: a regression run has no such curve.")
        if label is not None:
            self._known_label(label, self.classes or self.targets)
        curves = {name: values for name, *values in self.arrays.of(split).curves(every=label is not None)}
        if label is not None:
            curves = {name: values for name, values in curves.items() if name == label}
        if not curves:
            raise InputError(f"{what}: split {split!r} holds no positive and negative samples of {label or 'a label'}.")
        made = []
        for name, (positive, score) in curves.items():
            made.append(display.from_predictions(positive, score, name=name, ax=ax))
            ax = made[-1].ax_
        return made[0] if label is not None or self.task == "binary" else made


def load_run(path: str | Path) -> Run:
    """Open a run after checking every file of it against the SHA-256 in run.json.

    Raises:
        MissingFileError: there is no such directory.
        RunError: it is no run, is of an unknown kind or a newer format, or a file is missing, changed or unlisted.
    """
    path = Path(path)
    if not path.exists():
        unfinished = path.with_name(path.name + ".tmp") if path.name else path
        more = f" {unfinished.name} beside it is an unfinished run: go on with --resume." if unfinished.is_dir() else ""
        raise MissingFileError(f"{path}: no such run directory.{more}")
    record = read_record(path)
    check_files(path, record["files"])
    return Run(path, record)
