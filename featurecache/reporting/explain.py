"""Heat maps of a run's samples, all views side by side, and feature maps of a body: PNG files and explain.json."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurecache.bodies.engines import resolve_device
from featurecache.bodies.registry import RUN_PREFIX, load_body, load_run_body
from featurecache.bodies.tapped import Tapped
from featurecache.bodies.taps import resolve_taps
from featurecache.config import AUTO, Tap
from featurecache.data.choice import reader_of_file
from featurecache.data.manifest import Manifest, read_manifest
from featurecache.data.readers import get_reader
from featurecache.data.readers.base import ReadFailure, read
from featurecache.data.targets import Target
from featurecache.errors import FeatureCacheError, InputError, MissingFileError, did_you_mean
from featurecache.evaluation.calibration import Calibration
from featurecache.fit import HeadRun, compare_recipes
from featurecache.heads.base import Head
from featurecache.joint.images import Failure, SampleImages
from featurecache.joint.predict import load_joint
from featurecache.newsamples import NewSamples, manifest_config
from featurecache.predict import extract_config, whole
from featurecache.progress import Reporter, Silent
from featurecache.reporting.attribution import AT_ONCE, Network, check_method, heat_maps
from featurecache.reporting.heatdrawing import as_colour, draw_panels, draw_sample, grid
from featurecache.run import Run
from featurecache.rundir.results import make_predictions
from featurecache.stageone.jobs import set_up_views
from featurecache.stageone.viewsetup import ViewSetup

FOLDER, LISTING = "explain", "explain.json"
DEFAULT_SAMPLES = 6
MOST_MAPS = 64
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Explained:
    """What was drawn.

    Attributes:
        folder: with the pictures and explain.json.
        samples: the entries of explain.json: sample_id, file, class, target, prediction, score, hottest (view, x, y;
            None where no pixel speaks for the class), alt.
        failures: rows of failures.csv for samples whose images can't be read.
        notes: what a user should know.
    """

    folder: Path
    samples: list[dict[str, Any]]
    failures: list[dict[str, str]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Artist:
    """What is drawn of every sample: a run as a network, and which output is explained how."""

    run: Run
    network: Network
    head: Head
    method: str
    output: int | None
    layer: str
    seed: int

    def draw(self, shown: dict[str, Tensor], about: dict[str, str], path: Path) -> dict[str, Any]:
        """Draw one sample.

        Args:
            shown: per view (channels, height, width), as read and brought to size.
            about: `sample_id` and `target`.
            path: of the PNG.

        Returns:
            The rest of its entry in explain.json.
        """
        images = {
            view: self.network.setups[view].preprocessing.normalise(image[None])[0] for view, image in shown.items()
        }
        features = self.network.features(images)
        scores = _scores(self.run, self.head, features)
        names = self.run.classes or self.run.targets
        output = int(np.nanargmax(scores)) if self.output is None else self.output
        if np.isnan(scores[output]):
            raise InputError(f"--class {names[output]}: the head has no score for it, since it had none to learn from")
        heats = heat_maps(self.network, images, output, self.method, layer=self.layer, seed=self.seed)
        hottest = max(heats, key=lambda view: float(heats[view].max()))
        y, x = np.unravel_index(int(heats[hottest].argmax()), heats[hottest].shape)
        found = {"view": hottest, "x": int(x), "y": int(y)} if heats[hottest][y, x] > 0 else None
        prediction, score = _decided(self.run, scores), float(scores[output])
        title = about["sample_id"] + (f", labelled {about['target']}" if about["target"] else "")
        what = f"{self.method} for {names[output]} ({score:.3g})"
        where = f"hottest view: {hottest}" if found else "no part of it speaks for that"
        subtitle = f"{what}; the model says {prediction}; {where}"
        pictures = {view: _eight_bit(shown[view]) for view in heats}
        draw_sample(path, pictures, heats, title=title, subtitle=subtitle)
        return {
            "class": names[output],
            "score": round(score, 6),
            "prediction": prediction,
            "hottest": found,
            "alt": f"{title}: {', '.join(images)} with {subtitle}",
        }


def explain(
    run: Run,
    new: NewSamples,
    *,
    method: str = "gradcam",
    samples: str = str(DEFAULT_SAMPLES),
    output: str | None = None,
    layer: str = "",
    out: Path | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Explained:
    """Draw where a model looks.

    Of several images of a view the first is drawn and counts; texts count, but are not drawn. An image that can't be
    read counts as missing where its sample has another. Everything runs in torch,
    in fp32; heads run on the CPU.

    Args:
        run: of fit-head or finetune-joint.
        new: a manifest, or image files; its `batch_size` is how many perturbed images one pass of occlusion takes.
        method: see `featurecache.reporting.attribution.METHODS`.
        samples: ids, separated by commas, or how many, evenly from the manifest.
        output: class, label or target that is explained; default what the model says of each sample (multilabel: its
            most probable label; binary: the positive class).
        layer: the module that Grad-CAM looks at.
        out: folder of the pictures; default RUN/explain, whose content is replaced.
        seed: of what gradient-shap draws.
        reporter: told of progress.

    Raises:
        InputError: unknown method, class, layer or sample; a method that does not suit the head.
        DependencyError: Captum is missing.
        RecipeMismatchError: the bodies are not those that the run was made with.
        FeatureCacheError: no sample could be read.
    """
    reporter = reporter or Silent()
    if run.task == "dense":
        raise InputError(f"{run.path}: predicts masks, which say themselves where; heat maps are for scores of samples")
    with tempfile.TemporaryDirectory(prefix="featurecache-") as scratch:
        config = manifest_config(run, new, Path(scratch))
        head, setups, notes = load_network(run, config, new, Path(scratch))
        device, at_once = resolve_device(new.device), whole(new.batch_size)
        network = Network.of(setups, head, device=device, at_once=AT_ONCE if at_once == "auto" else at_once)
        check_method(method, gradient=network.gradient)
        if not network.pictured(network.setups):
            raise InputError(f"{run.path}: its views are texts, which have no heat map")
        artist = Artist(run, network, head, method, choose_output(run, output), layer, seed)
        manifest = read_manifest(config)
        rows = choose_samples(manifest, samples)
        if len(rows) < manifest.table.height and samples.isdecimal() and samples not in manifest.table["sample_id"]:
            some = f"{len(rows)} of {manifest.table.height:,} samples, taken evenly from the manifest"
            notes = [*notes, f"{some}; --samples ID,ID chooses others, --samples N how many"]
        workers = (os.cpu_count() or 1) if (given := whole(new.workers)) == "auto" else given
        folder = run.path / FOLDER if out is None else Path(out)
        made = Path(scratch) / FOLDER
        made.mkdir()
        entries, failures = _draw_all(artist, manifest, rows, made, workers, reporter)
        if not entries:
            first = failures[0] if failures else {"sample_id": "?", "error": "no samples"}
            raise FeatureCacheError(f"nothing to explain: sample {first['sample_id']}: {first['error']}")
        listing = {"schema": 1, "method": method, "layer": layer, "seed": seed, "samples": entries}
        (made / LISTING).write_text(json.dumps(listing, indent=1, ensure_ascii=False), encoding="utf-8")
        _publish(made, folder)
    return Explained(folder, entries, failures, notes)


def _draw_all(
    artist: Artist, manifest: Manifest, rows: Sequence[int], folder: Path, workers: int, reporter: Reporter
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Draw these samples into a folder; entries of explain.json, and rows of failures.csv."""
    entries: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    reporter.begin("explain", len(rows), "samples")
    try:
        loaded = SampleImages(manifest, artist.network.setups).readable(rows, workers=workers, ahead=workers)
        for number, (row, (found, unread)) in enumerate(zip(rows, loaded, strict=True)):
            name = str(manifest.table["sample_id"][row])
            failures += [{"sample_id": name, "view": f.view, "path": f.path, "error": f.error} for f in unread]
            if not isinstance(found, Failure) and artist.network.pictured(found.images):
                shown = {view: some[0].contiguous() for view, some in found.images.items()}
                file = f"{number:03d}-{_UNSAFE.sub('_', name)[:60]}.png"
                about = {"sample_id": name, "file": file, "target": target_text(artist.run, manifest, row)}
                entries.append({**about, **artist.draw(shown, about, folder / file)})
            elif not unread:
                failures.append({"sample_id": name, "view": "", "path": "", "error": "has no image of the views"})
            reporter.advance("explain", 1)
    finally:
        reporter.end("explain")
    return entries, failures


def load_network(
    run: Run, manifest: Any, new: NewSamples, scratch: Path
) -> tuple[Head, dict[str, ViewSetup], list[str]]:
    """Head and bodies of a run, checked to be those that it was made with; and what to note."""
    if run.kind == "joint":
        loaded = load_joint(run, trust=tuple((new.body or {}).get("trust_factory") or ()))
        return loaded.head, dict(loaded.setups), []
    own = HeadRun(run.path, run.record)
    setups = set_up_views(extract_config(own, manifest, new, scratch / "store"), run.views)
    engine = {"engine": "torch", "precision": "fp32", "storage_dtype": "float32"}
    compare_recipes(own, {view: setup.recipe(**engine) for view, setup in setups.items()})
    return own.head, setups, []


def choose_output(run: Run, name: str | None) -> int | None:
    """The column of the scores that is explained; None: whatever the model says.

    Raises:
        InputError: there is no such class, label or target.
    """
    known = run.classes or run.targets
    if name is None:
        return 1 if run.task == "binary" else 0 if len(known) == 1 else None
    if name not in known:
        what = "class" if run.classes else "label"
        raise InputError(f"--class {name!r}: no such {what}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return known.index(name)


def choose_samples(manifest: Manifest, text: str) -> list[int]:
    """Rows of the manifest's table: those of the ids, or so many, evenly.

    Raises:
        InputError: an unknown id, or none.
    """
    ids = [str(name) for name in manifest.table["sample_id"].to_list()]
    place = {name: row for row, name in enumerate(ids)}
    if text.isdecimal() and text not in place:
        count = min(int(text), len(ids))
        if not count:
            raise InputError(f"--samples {text}: give ids, separated by commas, or how many")
        return [int(row) for row in np.unique(np.linspace(0, len(ids) - 1, count).round().astype(int))]
    wanted = [text] if text in place else [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in wanted if name not in place]
    if unknown or not wanted:
        near = did_you_mean(unknown[0], ids) if unknown and len(ids) < 50_000 else ""
        raise InputError(f"--samples: {manifest.path.name} has no sample {unknown[0] if unknown else text!r}.{near}")
    return [place[name] for name in dict.fromkeys(wanted)]


def target_text(run: Run, manifest: Manifest, row: int) -> str:
    """What the manifest says that a sample is; '' where it has no such column, or several targets."""
    columns = [name for name in run.targets if name in manifest.table.columns]
    if len(run.targets) != 1 or not columns:
        return ""
    value = manifest.table[columns[0]].cast(pl.String)[row]
    return "" if value is None else str(value)


def _scores(run: Run, head: Head, features: Tensor) -> NDArray[np.float64]:
    """(outputs,) as the run predicts them, calibrated where it is."""
    found = head.scores(features.numpy())
    recorded = run.record.get("calibration")
    if recorded:
        found = Calibration.from_json(recorded).apply(found, exclusive=bool(run.classes))
    return np.asarray(found[0], dtype=np.float64)


def _decided(run: Run, scores: NDArray[np.float64]) -> str:
    """What the run decides, in words."""
    if run.task == "regression":
        return ", ".join(f"{name} {value:.4g}" for name, value in zip(run.targets, scores, strict=True))
    values: NDArray[Any] = np.full(1, -1) if run.classes else np.full((1, len(run.targets)), np.nan)
    target = Target(run.task, run.targets, run.classes, values)  # type: ignore[arg-type]
    made = make_predictions(target, scores[None], sample_ids=["?"])
    decided = made.decisions(run.threshold["value"] if run.threshold else None)
    if run.classes:
        return run.classes[int(decided[0])]
    return ", ".join(name for name, yes in zip(run.targets, decided[0], strict=True) if yes > 0.5) or "none"


def _eight_bit(image: Tensor) -> NDArray[np.uint8]:
    """(channels, height, width) for the eye; floats, of which an X-ray fills a small part, from least to most."""
    if image.dtype == torch.uint8:
        return image.numpy()
    values = image.float() - float(image.min())
    return (values * (255 / max(float(values.max()), 1e-6))).round().to(torch.uint8).numpy()


def _publish(made: Path, folder: Path) -> None:
    """Put a finished folder in its place; what an earlier call left there goes, anything else is refused."""
    if folder.exists() and not (folder / LISTING).is_file() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds something else than heat maps. Choose another --out.")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(made, fresh)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def show_features(
    image: Path,
    out: Path,
    *,
    body: str,
    tap: str,
    weights: str = "DEFAULT",
    view: str | None = None,
    reader: str = AUTO,
    image_size: int | None = None,
    most: int = MOST_MAPS,
    trust: Sequence[str] = (),
) -> dict[str, Any]:
    """Draw the feature maps that a tap gives for one image, the strongest first.

    Args:
        image: the file.
        out: the PNG.
        body: as `featurecache bodies list` names it, or `run:DIR`.
        tap: dotted name of a module that gives maps.
        weights: of the body.
        view: which body of a run.
        reader: of the file; `auto`: decided by its suffix, or how it begins.
        image_size: side in pixels; default what the body expects.
        most: how many channels.
        trust: factories that a run may name.

    Returns:
        `shape` of the tap's output, `shown` channels in their order, `strength` of each.

    Raises:
        InputError: the tap gives no maps, or the names are unknown.
        MissingFileError: no such image.
    """
    if not image.is_file():
        raise MissingFileError(f"{image}: no such file")
    if body.startswith(RUN_PREFIX):
        loaded = load_run_body(Path(body.removeprefix(RUN_PREFIX)), view, trust=trust)
    else:
        loaded = load_body(body, weights, seed=0 if weights == "none" else None)
    steps = loaded.preprocessing
    if image_size is not None:
        steps = replace(steps, resize=image_size, crop=image_size)
    size = steps.size()
    if size is None:
        raise InputError(f"--body {body}: give --image-size N")
    name = reader_of_file(image) if reader == AUTO else reader
    decoded = read(get_reader(name, channels=steps.channels), image.read_bytes(), {})
    if isinstance(decoded, ReadFailure):
        raise InputError(f"{image}: {decoded.message}")
    pixels = steps.apply(decoded).contiguous()
    (resolved,) = resolve_taps(loaded, [Tap.create({"module": tap, "pool": "none"})], size)
    with torch.no_grad():
        maps = Tapped(loaded, (resolved,)).eval()(steps.normalise(pixels[None]))[0][0].float()
    if maps.ndim != 3 or min(maps.shape[1:]) < 2:
        raise InputError(
            f"--tap {tap}: gives {tuple(maps.shape)}, which is no map. List taps: featurecache bodies show {body}"
        )
    strength = maps.abs().mean(dim=(1, 2))
    order = torch.argsort(strength, descending=True, stable=True)[:most].tolist()
    across = int(np.ceil(np.sqrt(len(order))))
    picture = grid(maps[order].numpy(), across)
    panels = [("image", [as_colour(_eight_bit(pixels))]), (f"{len(order)} of {len(maps)} channels", [picture])]
    title = f"{body}, {tap}: {' x '.join(map(str, maps.shape))}"
    subtitle = "the strongest channels, each from its least (dark) to its most"
    draw_panels(out, panels, title=title, subtitle=subtitle, side=512)
    return {
        "shape": list(maps.shape),
        "shown": order,
        "strength": [round(float(strength[channel]), 6) for channel in order],
    }
