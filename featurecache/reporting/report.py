"""report.html: one self-contained page of a run or an evaluation, made from nothing but the files of its directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from featurecache.reporting import evidence, masks, measured, origin
from featurecache.reporting.material import Material, read_material
from featurecache.reporting.wording import HEADLINE, how_measured, interval, metric_name, number, percent, sentence
from featurecache.rundir.files import read_record

environment = Environment(
    loader=PackageLoader("featurecache", "reporting/templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.filters.update(number=number, percent=percent, interval=interval)


class Section(NamedTuple):
    """A part of the page: `make` gives what templates/sections/<name>.html.j2 shows, or None where there is nothing."""

    name: str
    title: str
    make: Callable[[Material], dict[str, Any] | None]


SECTIONS = (
    Section("metrics", "Metrics", measured.metrics),
    Section("classes", "Classes", measured.classes),
    Section("masks", "Masks", masks.masks),
    Section("labels", "Labels", measured.labels),
    Section("curves", "Curves", measured.curves),
    Section("subgroups", "Subgroups", measured.subgroups),
    Section("evidence", "What each view adds", evidence.views),
    Section("mistakes", "Mistakes to learn from", evidence.mistakes),
    Section("heat", "Heat maps", evidence.heat_maps),
    Section("samples", "Samples", origin.samples),
    Section("split", "Split and leaks", origin.split),
    Section("views", "Views and preprocessing", origin.recipes),
    Section("training", "Training", evidence.training),
    Section("stated", "What only a person can state", origin.stated),
    Section("again", "Do it again", origin.again),
)


def write_report(directory: str | Path, record: Mapping[str, Any] | None = None, *, images: bool = True) -> Path:
    """Write report.html into a run directory from what lies there.

    Args:
        directory: of the run, published or still being written.
        record: its run.json; read from the directory if not given.
        images: whether pictures are shown, where the run holds any.

    Returns:
        The page's path.
    """
    directory = Path(directory)
    record = read_record(directory) if record is None else record
    path = directory / "report.html"
    path.write_text(render(directory, record, images=images), encoding="utf-8")
    return path


def write_evaluation_report(directory: Path, run: Path, record: Mapping[str, Any], *, name: str) -> Path:
    """The same for an evaluation: `directory` is its folder, `run` and `record` are those of the run."""
    path = directory / "report.html"
    path.write_text(page(read_material(directory, record, run=run), name), encoding="utf-8")
    return path


def render(directory: Path, record: Mapping[str, Any], *, images: bool = True) -> str:
    """The page of a run as HTML text; see `write_report`."""
    return page(read_material(directory, record, images=images), directory.name.removesuffix(".tmp"))


def page(material: Material, title: str) -> str:
    """The page: a head with what counts, then every section that has something to show."""
    record = material.record
    made = []
    for section in SECTIONS:
        found = section.make(material)
        if found is not None:
            template = environment.get_template(f"sections/{section.name}.html.j2")
            html = template.render(record=record, material=material, split=material.split_name, **found)
            made.append({"id": section.name, "title": found.get("title", section.title), "html": html})
    return environment.get_template("report.html.j2").render(
        record=record,
        title=title,
        kind=f"evaluation of a {record['kind']} run" if material.evaluation is not None else f"{record['kind']} run",
        lead=sentence(record, material.metrics, material.split, where=material.split_name),
        measured=how_measured(record) if material.evaluation is None else origin.how_evaluated(material),
        facts=origin.facts(material),
        split=material.split_name,
        figures=material.figures,
        cards=_cards(record, material.figures),
        sections=made,
    )


def _cards(record: Mapping[str, Any], figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The few figures that a reader looks for first."""
    names = [name for name in HEADLINE.get(str(record["task"]), ()) if figures.get(name) is not None][:4]
    intervals = figures.get("intervals") or {}
    return [{"name": metric_name(name), "value": figures[name], "interval": intervals.get(name)} for name in names]
