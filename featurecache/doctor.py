"""Looks at this installation, this machine and a store: what is fine, what is slow or risky, what can't work."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from featurecache.amounts import counted
from featurecache.errors import FeatureCacheError, MissingFileError
from featurecache.machine.memory import free_memory
from featurecache.rundir.record import package_version
from featurecache.store.files import file_system, is_network

NAME = "featurecache"
NEWEST_TRIED = (3, 13)  # of Python
LITTLE_DISK, NO_DISK = 10 << 30, 1 << 30
LITTLE_MEMORY = 2 << 30
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[.*?\])?\s*(?:>=\s*(?P<least>[\d.]+))?[^;]*(?:;(?P<rest>.*))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"](?P<name>[\w-]+)['\"]")

Status = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `found` says what is there, `fix` what to do unless it passed."""

    name: str
    status: Status
    found: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        """Plain values."""
        return asdict(self)


def examine(store: Path | None = None) -> Iterator[Check]:
    """Check this installation and machine, and the store if one is given. Writes nothing; a check never raises.

    Args:
        store: a store; the disk looked at is where it lies, else that of the current directory.
    """
    yield from _packages()
    for check in (_python, _torch, _device, _openvino, _extras, _weights):
        yield from _safely(check.__name__.strip("_"), check)
    where = Path.cwd() if store is None else store
    for name, look in (("disk", _disk), ("memory", _memory), ("file system", _file_system)):
        yield from _safely(name, lambda look=look: look(where))  # type: ignore[misc]
    if store is not None:
        yield from _safely("store", lambda: _store(store))


def _safely(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from check()
    except Exception as error:  # what is broken is what this is for
        yield Check(name, "FAIL", f"{type(error).__name__}: {error}", "See the message; reinstalling may help.")


def _python() -> Iterator[Check]:
    version = platform.python_version()
    if sys.version_info[:2] > NEWEST_TRIED:
        newest = ".".join(map(str, NEWEST_TRIED))
        yield Check("python", "WARN", f"{version}, tried up to {newest}", f"Use Python {newest} if something breaks.")
    else:
        yield Check("python", "PASS", f"{version} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Check]:
    """What the installed package itself says that it needs, against what is installed."""
    yield Check(NAME, "PASS", package_version())
    found, wrong = [], []
    for line in requirements():
        need = _REQUIREMENT.match(line)
        if need is None or need["rest"]:  # extras, and what only some platforms have
            continue
        try:
            here = metadata.version(need["name"])
        except metadata.PackageNotFoundError:
            wrong.append(f"{need['name']} is missing")
            continue
        found.append(f"{need['name']} {here}")
        if need["least"] and _numbers(here) < _numbers(need["least"]):
            wrong.append(f"{need['name']} {here} is older than {need['least']}")
    if wrong:
        yield Check("packages", "FAIL", "; ".join(wrong), f"pip install --upgrade {NAME}")
    else:
        yield Check("packages", "PASS", ", ".join(found))


def requirements() -> list[str]:
    """What the package needs, a requirement a line as its metadata has them; of a bare checkout, what that says."""
    try:
        return metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:
        file = Path(__file__).parent.parent / "pyproject.toml"
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"] if file.is_file() else {}
    extras = project.get("optional-dependencies", {})
    return [
        *project.get("dependencies", []),
        *(f"{line}; extra == '{extra}'" for extra, lines in extras.items() for line in lines),
    ]


def _numbers(version: str) -> tuple[int, ...]:
    """`2.14.1+cpu` as (2, 14, 1)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _torch() -> Iterator[Check]:
    try:
        from featurecache.machine.lean import torchvision
    except (ImportError, RuntimeError, AttributeError) as error:
        yield Check("torch", "FAIL", f"can't be imported: {error}", "Install a torch and a torchvision that match.")
        return
    import torch

    yield Check("torch", "PASS", f"{torch.__version__}, torchvision {torchvision.__version__}")


def _device() -> Iterator[Check]:
    import torch

    from featurecache.bodies.engines.devices import cpu_has_bf16, fast_precision, resolve_device

    device = resolve_device("auto")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cpu":
        bf16 = "bf16 in hardware" if cpu_has_bf16() else "no bf16 in hardware"
        yield Check("device", "PASS", f"cpu, {cores} cores, {bf16}")
        if torch.version.cuda and shutil.which("nvidia-smi"):
            yield Check("gpu", "WARN", "there is an NVIDIA driver, but torch sees no GPU", "Check nvidia-smi.")
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    yield Check("device", "PASS", f"{device} ({name}), {fast_precision(device)} is fast, {cores} cores")


def _openvino() -> Iterator[Check]:
    from featurecache.bodies.engines.devices import resolve_device

    try:
        version = metadata.version("openvino")
    except metadata.PackageNotFoundError:
        slow = resolve_device("auto").type == "cpu"
        what = "not installed" + (": extraction runs on torch, which is two to four times slower on a CPU" * slow)
        yield Check("openvino", "WARN" if slow else "PASS", what, "pip install openvino" * slow)
        return
    from featurecache.bodies.engines.openvino import openvino_precision

    yield Check("openvino", "PASS", f"{version}, runs bodies on the CPU in {openvino_precision('auto')}")


def _extras() -> Iterator[Check]:
    """Optional parts; none of them is missed by who does not use it."""
    packages: dict[str, list[str]] = {}
    for line in requirements():
        need = _REQUIREMENT.match(line)
        extra = _EXTRA.search(need["rest"] or "") if need else None
        if need and extra and need["name"] != NAME:
            packages.setdefault(extra["name"], []).append(need["name"])
    there = {extra: all(map(_installed, names)) for extra, names in packages.items()}
    has = ", ".join(extra for extra, yes in there.items() if yes) or "none"
    lacks = ", ".join(extra for extra, yes in there.items() if not yes)
    yield Check("extras", "PASS", f"{has}" + (f"; not installed: {lacks}" if lacks else ""))


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _weights() -> Iterator[Check]:
    import torch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    files = [path for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files)
    held = f"{folder}: {len(files)} files, {size / 1e6:,.0f} MB"
    first = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(first, os.W_OK):
        yield Check(
            "weights cache", "WARN", f"{held}, not writable", "Set TORCH_HOME to a folder where weights can be kept."
        )
    else:
        yield Check("weights cache", "PASS", held)


def _disk(where: Path) -> Iterator[Check]:
    there = _existing(where)
    free = shutil.disk_usage(there).free
    status: Status = "FAIL" if free < NO_DISK else "WARN" if free < LITTLE_DISK else "PASS"
    fix = "" if status == "PASS" else "Free some space, or put the store on another disk."
    yield Check("free disk", status, f"{free / 1e9:,.1f} GB at {there}", fix)


def _memory(where: Path) -> Iterator[Check]:
    free = free_memory()
    low = free < LITTLE_MEMORY
    fix = "Close other programs, or give --batch-size 8 and --memory." if low else ""
    yield Check("free memory", "WARN" if low else "PASS", f"{free / 1e9:,.1f} GB", fix)


def _file_system(where: Path) -> Iterator[Check]:
    kind = file_system(_existing(where))
    if is_network(kind):
        yield Check(
            "file system",
            "WARN",
            f"{kind} is a network file system: locks and SQLite can't be relied on there",
            "Write the store on a local disk, and copy it when it is complete.",
        )
    else:
        yield Check("file system", "PASS", kind or "local, as far as can be told")


def _existing(path: Path) -> Path:
    full = path.absolute()
    return next(folder for folder in (full, *full.parents) if folder.exists())


def _store(path: Path) -> Iterator[Check]:
    from featurecache.store.format import StorePaths
    from featurecache.store.lock import writer_of
    from featurecache.store.store import FeatureStore

    try:
        with FeatureStore.create_or_open(path, write=False) as store:
            info: dict[str, Any] = store.info()
    except FeatureCacheError as error:
        gone = isinstance(error, MissingFileError)
        fix = "Check the path, or make a store with `featurecache extract`." if gone else f"featurecache verify {path}"
        yield Check("store", "FAIL", str(error).splitlines()[0], fix)
        return
    rows = sum(recipe["rows"] for recipe in info["recipes"])
    parts = ((len(info["recipes"]), "recipe"), (rows, "row"), (len(info["datasets"]), "dataset"))
    what = f"format {info['format']}, {', '.join(counted(*part) for part in parts)}"
    yield Check("store", "PASS", what)
    if not os.access(path, os.W_OK):
        yield Check("writing", "WARN", "the store is read-only", "Copy it to where you may write, to add to it.")
    holder = writer_of(StorePaths(path).lock)
    if holder is None:
        yield Check("writer lock", "PASS", "nobody writes")
    else:
        who = f"process {holder}" if holder else "another process"
        yield Check(
            "writer lock", "WARN", f"{who} is writing", "Wait until it has ended; reading is possible meanwhile."
        )
    yield from _datasets(path, info)


def _datasets(path: Path, info: dict[str, Any]) -> Iterator[Check]:
    from featurecache.dataset import find_binding
    from featurecache.store.store import FeatureStore
    from featurecache.upkeep.rebinding import manifest_digest

    for dataset in info["datasets"]:
        name = f"dataset {dataset['name']}"
        pending, failed = (
            sum(view.get(state, 0) for view in dataset["views"].values()) for state in ("pending", "failed")
        )
        with FeatureStore.create_or_open(path, write=False) as store:
            binding = find_binding(store, dataset["name"])
        said = f"{dataset['samples']:,} samples, {failed:,} failed" if failed else f"{dataset['samples']:,} samples"
        manifest = binding.manifest_path
        if pending:
            more = "Run the same `featurecache extract` again: it goes on where it stopped."
            yield Check(name, "WARN", f"{said}, {pending:,} images not yet extracted", more)
        elif manifest_digest(binding) not in (None, binding.manifest_digest):
            fix = f"If only labels changed: featurecache fit-head ... --manifest {manifest}; else extract again."
            yield Check(name, "WARN", f"{said}; {manifest} has changed since", fix)
        else:
            yield Check(name, "PASS", said)
