"""Bodies by name: torchvision/NAME, timm/NAME, package.module:factory, and those that a run has fine-tuned."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from featurecache.bodies.channels import adapt_channels, adapt_statistics
from featurecache.bodies.families import (
    Built,
    Spec,
    build_factory,
    build_timm,
    build_torchvision,
    import_timm,
    parse_weights,
)
from featurecache.bodies.names import factory_names, timm_names, torchvision_names
from featurecache.bodies.weights import read_weights
from featurecache.data.transforms import Preprocessing
from featurecache.errors import InputError, MissingFileError, RunError, did_you_mean

RUN_PREFIX = "run:"
FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass
class Body:
    """A network that turns images into activations.

    Attributes:
        name: as the user wrote it.
        architecture: what builds the module again: `torchvision/...`, `timm/...` or `package.module:factory`, never a
            path.
        module: in eval mode, parameters without gradient, classifier kept.
        preprocessing: what its weights expect.
        categories: class names of its classifier, where known.
        classifier: dotted name of the module whose input is `penultimate`, or None.
        pre_logits: whether `penultimate` is timm's `forward_head(forward_features(x), pre_logits=True)`.
    """

    name: str
    architecture: str
    module: nn.Module
    preprocessing: Preprocessing
    categories: tuple[str, ...] | None = None
    classifier: str | None = None
    pre_logits: bool = False


def load_body(
    name: str,
    weights: str = "DEFAULT",
    *,
    seed: int | None = None,
    channels: int | None = None,
    trust: Sequence[str] = (),
    view: str | None = None,
) -> Body:
    """Load a body with its weights and its own preprocessing.

    Args:
        name: `torchvision/NAME`, `timm/NAME`, `package.module:factory` (imported, so only ever what a person typed) or
            `run:DIR`.
        weights: `DEFAULT` (the hub's, or a factory's own), `none` (random, needs `seed`), `shipped`, a published name
            (`IMAGENET1K_V1`), or the path of a .safetensors or .pth file that holds tensors only.
        seed: for random weights.
        channels: input channels; None for the body's own.
        trust: factories that a run directory may name.
        view: whose body is taken from a run.

    Raises:
        InputError: unknown name, or weights that can't be had or don't fit.
        DependencyError: the body needs a package that is not installed.
    """
    if name.startswith(RUN_PREFIX):
        if weights != "DEFAULT":
            raise InputError(f"{name}: a run brings its own weights; leave out --weights {weights}")
        return load_run_body(Path(name.removeprefix(RUN_PREFIX)), view, trust=trust)
    check_name(name)
    spec = parse_weights(weights, name, seed=seed, channels=channels)
    body = _body(name, name, _build(name, spec, seed))
    return _with_channels(body, channels)


def check_name(name: str) -> None:
    """Refuse a name that no family knows, before anything is read or imported.

    Raises:
        InputError: names the nearest body and how to list them.
        DependencyError: timm is needed.
    """
    if FACTORY.fullmatch(name):
        return
    family, _, model = name.partition("/")
    if family == "torchvision" and model in torchvision_names():
        return
    if family == "timm" and model and ":" not in model and import_timm().is_model(model):
        return
    known = [f"torchvision/{known}" for known in torchvision_names()]
    if family == "timm":
        known = [f"timm/{known}" for known in timm_names()]
    near = did_you_mean(name if "/" in name else f"torchvision/{name}", known)
    word = re.split(r"[\d_.]", model or name)[0] or "WORD"
    raise InputError(
        f"no body {name!r}.{near} A body is torchvision/NAME, timm/NAME, package.module:factory or run:DIR. "
        f"See: featurecache bodies list {word}"
    )


def _build(architecture: str, spec: Spec, seed: int | None) -> Built:
    family, _, model = architecture.partition("/")
    if family == "torchvision":
        return build_torchvision(model, spec, seed)
    if family == "timm":
        return build_timm(model, spec, seed)
    return build_factory(architecture, spec, seed)


def _body(name: str, architecture: str, built: Built) -> Body:
    module = built.module.eval().requires_grad_(False)
    return Body(name, architecture, module, built.preprocessing, built.categories, built.classifier, built.pre_logits)


def _with_channels(body: Body, channels: int | None) -> Body:
    own = body.preprocessing
    if channels is None or channels == own.channels:
        return body
    adapt_channels(body.module, channels)
    mean, std = adapt_statistics(own.mean, channels), adapt_statistics(own.std, channels)
    return replace(body, preprocessing=replace(own, channels=channels, mean=mean, std=std))


def body_record(body: Body, file: str, preprocessing: Preprocessing | None = None) -> dict[str, Any]:
    """What run.json keeps per view so that `load_run_body` finds the body again.

    Args:
        body: the fine-tuned body.
        file: its weights, relative to the run directory: `bodies/<view>.safetensors`.
        preprocessing: what it was trained with, where that is not the body's own.
    """
    used = preprocessing or body.preprocessing
    return {
        "architecture": body.architecture,
        "channels": used.channels,
        "preprocessing": used.parameters(),
        "file": file,
        "classifier": body.classifier,
    }


def load_run_body(run_dir: Path, view: str | None, *, trust: Sequence[str] = ()) -> Body:
    """The body that a joint run tuned for a view.

    Nothing that run.json names is imported, unless it is registered under the entry point `featurecache.bodies` or
    repeated in `trust`.

    Args:
        run_dir: the run directory.
        view: which view's body; may be None where the run holds one.
        trust: factories that the user allows (`--trust-factory`).

    Raises:
        MissingFileError: no run there, or the weights are gone.
        RunError: the run was changed since it was written, or holds no such body.
        InputError: it names a factory that is not trusted.
    """
    source = f"run:{run_dir}"
    record = _read_record(Path(run_dir))
    bodies = record.get("bodies") or {}
    if not isinstance(bodies, dict) or not bodies:
        raise RunError(f"{source}: holds no fine-tuned bodies; they come from featurecache finetune-joint")
    if view is None and len(bodies) == 1:
        view = next(iter(bodies))
    if view not in bodies:
        raise RunError(
            f"{source}: no body for view {view!r}.{did_you_mean(str(view), bodies)} It has: {', '.join(bodies)}."
        )
    entry = bodies[view]
    try:
        architecture, file = str(entry["architecture"]), str(entry["file"])
        channels, parameters = int(entry["channels"]), entry["preprocessing"]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{source}: the record of the body for view {view!r} is incomplete ({error})") from None
    if "/" not in architecture and architecture not in trusted_factories(trust):
        raise InputError(
            f"{source}: names the factory {architecture!r} as its body. Nothing was imported. If you know and trust "
            f"that code, repeat its name: --trust-factory {architecture}"
        )
    check_name(architecture)
    state = read_weights(_checked_file(Path(run_dir), file, record.get("files") or {}))
    spec = Spec("file", "", state, f"{source} {file}", channels)
    body = _with_channels(_body(source, architecture, _build(architecture, spec, None)), channels)
    return replace(body, preprocessing=Preprocessing.from_parameters(parameters))


def trusted_factories(trust: Sequence[str]) -> set[str]:
    """Factories that data may name: installed under the entry point, or repeated by the user."""
    return {*trust, *factory_names()}


def _read_record(run_dir: Path) -> Mapping[str, Any]:
    path = run_dir / "run.json"
    if not path.is_file():
        raise MissingFileError(f"run:{run_dir}: no run there (there is no run.json)")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise RunError(f"{path}: holds a {type(record).__name__}, not the record of a run")
    return record


def _checked_file(run_dir: Path, file: str, hashes: Mapping[str, str]) -> Path:
    path = (run_dir / file).resolve()
    if not path.is_relative_to(run_dir.resolve()) or path.suffix != ".safetensors":
        raise RunError(f"run:{run_dir}: {file!r} is not a .safetensors file of the run directory")
    if not path.is_file():
        raise MissingFileError(f"run:{run_dir}: {file} is missing")
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if hashes.get(file) != digest:
        raise RunError(f"run:{run_dir}: {file} has changed since the run was written (its SHA-256 differs)")
    return path
