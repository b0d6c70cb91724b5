"""What each stage can be told: one frozen model per stage, unknown keys refused with the near name; TOML in and out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from featurecache.errors import InputError, MissingFileError, did_you_mean

T = TypeVar("T")

Task = Literal["auto", "binary", "multiclass", "multilabel", "regression", "dense"]
Engine = Literal["auto", "torch", "openvino"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
POOLS = ("auto", "none", "avg", "max", "avgmax", "gem", "rows", "flatten", "cls", "tokens-avg")
AUTO = "auto"  # a reader that the files of a view decide on
ANY_VIEW = "*"  # the key of PerView that stands for every view without an entry of its own


def _per_view(value: Any) -> Any:
    """A bare value means every view; a mapping names views (`*` is the rest)."""
    return value if isinstance(value, Mapping) else {ANY_VIEW: value}


PerView = Annotated[dict[str, T], BeforeValidator(_per_view)]
"""An option given once for all views, or per view: `{"*": everywhere_else, "lateral": here}`."""


def for_view(option: Mapping[str, T], view: str, default: T) -> T:
    """The value that an option holds for one view."""
    return option.get(view, option.get(ANY_VIEW, default))


# What pydantic adds to the place of an error to tell the members of a union apart.
_MEMBER = re.compile(r"(constrained-\w+|literal\[.*\]|tuple\[.*\]|function-.*|int|float|str|bool|none)", re.DOTALL)


def _problems(error: ValidationError) -> list[str]:
    """A line per place: what is wrong there and what was found; the members of a union joined by `or`."""
    found: dict[str, tuple[list[str], str]] = {}
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if not _MEMBER.fullmatch(str(part)))
        own = item["type"] == "value_error"
        messages, _ = found.setdefault(where, ([], "" if own else f" (found {item['input']!r})"))
        messages.append(item["msg"].removeprefix("Value error, "))
    lines = []
    for where, (messages, value) in found.items():
        first, *others = dict.fromkeys(messages)
        text = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
        lines.append(f"{where}: {text}{value}" if where else f"{text}{value}")
    return lines


class Settings(BaseModel):
    """Base of all configuration: frozen, and every unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            known = cls.model_fields
            for key in data:
                if key not in known:
                    raise ValueError(f"unknown key {key!r}.{did_you_mean(str(key), known)} Known: {', '.join(known)}.")
        return data

    @classmethod
    def create(cls, values: Mapping[str, Any], *, source: str = "") -> Self:
        """Validate `values`.

        Raises:
            InputError: names each offending key, what was found and what is accepted.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise InputError.from_problems(f"{source or cls.__name__}: not valid", _problems(error)) from None

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read and validate a TOML file.

        Raises:
            MissingFileError: there is no such file.
            InputError: it is not TOML, or a key or value is not accepted.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise MissingFileError(f"{path}: no such file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid TOML: {error}") from None
        return cls.create(values, source=str(path))

    def fields_of(self, *parts: type[Settings]) -> dict[str, Any]:
        """The values of those fields that other configurations have too."""
        return {name: getattr(self, name) for part in parts for name in part.model_fields}

    def to_toml(self) -> str:
        """TOML text that `from_toml` reads back to an equal object (None is left out: TOML has none)."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


class Tap(Settings):
    """One tap as the user writes it: `NAME[:POOL]`.

    `module` is `penultimate` or a dotted module name; pool `auto` becomes `none` for vectors and `avg` for maps.
    """

    module: str = "penultimate"
    pool: Literal["auto", "none", "avg", "max", "avgmax", "gem", "rows", "flatten", "cls", "tokens-avg"] = "auto"

    @classmethod
    def parse(cls, text: str) -> Tap:
        """`layer4:avg` -> Tap(module='layer4', pool='avg')."""
        module, _, pool = text.partition(":")
        if not module:
            raise InputError(f"tap {text!r}: no module name before the colon. Write NAME or NAME:POOL.")
        if pool and pool not in POOLS:
            known = f"{did_you_mean(pool, POOLS)} Known: {', '.join(POOLS)}."
            raise InputError(f"tap {text!r}: unknown pooling {pool!r}.{known}")
        return cls.create({"module": module, "pool": pool or "auto"})

    def __str__(self) -> str:
        return self.module if self.pool == "auto" else f"{self.module}:{self.pool}"


def _taps(value: Any) -> Any:
    """Accept 'layer4', ['layer4:avg', 'penultimate'] and the explicit mapping, for all views or per view."""

    def one(item: Any) -> Any:
        return Tap.parse(item) if isinstance(item, str) else item

    def many(items: Any) -> Any:
        return tuple(one(item) for item in items) if isinstance(items, list | tuple) else (one(items),)

    if isinstance(value, Mapping) and (not value or not {"module", "pool"} >= set(value)):
        return {view: many(items) for view, items in value.items()}
    return {ANY_VIEW: many(value)}


class ManifestConfig(Settings):
    """How the table of samples is read; shared by every command that takes a manifest."""

    manifest: Path
    views: dict[str, str] = {}
    layout: Literal["wide", "long"] = "wide"
    view_column: str | None = None
    path_column: str | None = None
    multi: Literal["error", "first", "mean", "max"] = "error"
    id: str | None = None
    root: Path | None = None
    allow_outside: bool = False
    reader: PerView[str] = {ANY_VIEW: AUTO}
    reader_settings: dict[str, dict[str, Any]] = {}  # by view, or `*`: {"name": {"alphabet": "abc"}}
    box: dict[str, tuple[str, ...]] = {}
    frame: dict[str, str] = {}
    flip_if: dict[str, str] = {}


class BodyConfig(Settings):
    """Which network runs over a view's images, and what is done to them before."""

    body: PerView[str] = {ANY_VIEW: "torchvision/densenet121"}
    weights: PerView[str] = {}
    image_size: PerView[int] = {}
    resize: PerView[int | Literal["none"]] = {}
    crop: PerView[int | Literal["none"]] = {}
    resize_mode: PerView[Literal["crop", "squash", "pad"]] = {}
    interpolation: PerView[Literal["nearest", "bilinear", "bicubic"]] = {}
    antialias: PerView[bool] = {}
    exif: PerView[bool] = {}
    mean: PerView[tuple[float, ...]] = {}
    std: PerView[tuple[float, ...]] = {}
    channels: PerView[int] = {}
    trust_factory: tuple[str, ...] = ()


class DeviceConfig(Settings):
    """Where and how the computation runs."""

    device: str = "auto"
    precision: Precision = "auto"
    batch_size: int | Literal["auto"] = "auto"
    workers: int | Literal["auto"] = "auto"


class ExtractConfig(ManifestConfig, BodyConfig, DeviceConfig):
    """Stage one."""

    store: Path
    name: str | None = None
    replace: bool = False
    seed: int | None = None  # of random weights; without it `weights = "none"` is refused; of replicas, there 0
    tap: Annotated[dict[str, tuple[Tap, ...]], BeforeValidator(_taps)] = {ANY_VIEW: (Tap(),)}
    engine: Engine = "auto"
    store_dtype: Literal["float16", "float32"] = "float16"
    codec: Literal["none", "zstd", "blosc", "gzip"] = "none"
    rows_per_chunk: int | None = None
    check: Literal["stat", "content"] = "stat"
    on_error: Literal["skip", "stop"] = "skip"
    retry_failed: bool = False
    replicas: int = 0  # augmented versions of each image, beside the plain one
    augment: tuple[str, ...] = ()  # default crop and flip


class SplitConfig(Settings):
    """How samples are divided; `split` is 'auto' or the name of a column that holds train, valid or test."""

    split: str = "auto"
    group: str | None = None
    seed: int = 0
    valid: float = 0.15
    test: float = 0.15

    @model_validator(mode="after")
    def _fractions(self) -> Self:
        if not (0 < self.valid < 1 and 0 <= self.test < 1 and self.valid + self.test < 1):
            raise ValueError(f"valid={self.valid}, test={self.test}: fractions in (0, 1) that leave rows for training")
        return self


class TargetConfig(Settings):
    """What is predicted."""

    target: tuple[str, ...]
    task: Task = "auto"
    uncertain: dict[str, Literal["ignore", "zero", "one"]] = {}
    masks: Literal["index", "inside", "alpha"] = "index"  # of a dense target: how a pixel says its class


class HeadConfig(SplitConfig):
    """How a head is fitted and measured, and what its run shows."""

    head: str = "fc"
    out: Path | None = None
    overwrite: bool = False
    settings: dict[str, Any] = {}
    device: str = "auto"
    bootstrap: int = 1000
    at: str | None = None
    calibrate: Literal["temperature", "isotonic"] | None = None
    images: Annotated[int, Field(ge=0)] | Literal["none"] = 12
    about: Path | None = None


class FitConfig(HeadConfig, TargetConfig):
    """Stage two."""

    store: Path
    dataset: str
    views: tuple[str, ...] = ()
    tap: PerView[tuple[str, ...]] = {}
    recipe: PerView[str] = {}
    manifest: Path | None = None
    allow_partial: bool = False
    missing: Literal["zero", "drop", "error"] = "zero"
    memory: int | Literal["auto"] = "auto"
    replicas: Literal["all", "none"] = "all"
    cv: int | None = None


class About(Settings):
    """What only a person can state about a model; what is left out is shown as not stated."""

    intended_use: str = ""
    users: str = ""
    out_of_scope: str = ""
    data_source: str = ""
    data_dates: str = ""
    reference_standard: str = ""
    external_test: str = ""
    limitations: str = ""
    licence: str = ""
    contact: str = ""


def _rates(value: Any) -> Any:
    """`LOWEST:HIGHEST` as two numbers."""
    if isinstance(value, str) and ":" in value:
        return tuple(value.split(":"))
    return value


def _sharing(value: Any) -> Any:
    """True and False, as a flag has them, are all and none."""
    return {True: "all", False: "none"}.get(value, value) if isinstance(value, bool) else value


class JointConfig(TargetConfig, ManifestConfig, BodyConfig, DeviceConfig, SplitConfig):
    """End-to-end fine-tuning of bodies and FC head. With `init`, views, bodies, target and split come from that run."""

    target: tuple[str, ...] = ()
    out: Path | None = None
    overwrite: bool = False
    resume: bool = False
    init: Path | None = None
    head: Literal["fc", "decoder"] = "fc"  # what the network ends in; with `init` that run's
    share_bodies: Annotated[Literal["all", "stem", "none"], BeforeValidator(_sharing)] = "none"
    stem: str | None = None  # the last module that views share
    fusion: str = "concat"
    tap: Annotated[dict[str, tuple[Tap, ...]], BeforeValidator(_taps)] = {}  # default penultimate; spatial: a map
    detach: bool = False  # the bodies never learn, only what stands on them
    pairs: bool = False  # samples of one view are compared in pairs
    train_from: PerView[str] = {}  # what lies above this module learns; what it gives comes from `store`
    store: Path | None = None
    store_dtype: Literal["float16", "float32"] = "float16"
    engine: Engine = "auto"
    replicas: int = 0
    epochs: int = 5
    freeze_epochs: int | None = None  # 1; with `init`, whose head knows the frozen bodies, 0
    unfreeze: Literal["all", "gradual"] = "all"
    lr: float | Literal["find"] | None = None  # 1e-3; with `init` 3e-4
    # Of the lowest layers, or (lowest, highest); a tenth of lr.
    body_lr: Annotated[float | tuple[float, float] | None, BeforeValidator(_rates)] = None
    warm_up: float = 0.25
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    patience: int | None = None
    view_dropout: float | None = None  # 0.1; with `init` 0, since its head reads views as they are
    augment: PerView[tuple[str, ...]] = {ANY_VIEW: ("crop", "flip")}
    augment_column: PerView[str] = {}  # says it sample by sample: names, none, or empty for the usual
    checkpoint_every: str = "10m"
    checkpoint_activations: bool = False
    compile: bool = False
    tensorboard: bool = False
    settings: dict[str, Any] = {}
    missing: Literal["zero", "drop", "error"] = "zero"
    bootstrap: int = 1000
    images: Annotated[int, Field(ge=0)] | Literal["none"] = 12
    about: Path | None = None
