"""Guesses from the names and values of a manifest's columns: what there is to predict, what belongs together."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import polars as pl

from featurecache.config import ManifestConfig
from featurecache.data.selectors import selector_columns

NAMED = ("label", "target", "class", "diagnosis", "outcome", "finding", "y")
"""Columns called so are taken first."""
DIVIDES = ("split", "fold", "group", "patient", "patient_id", "subject", "subject_id", "site")
MOST_CLASSES = 20
OWNERS = (
    r"patient(?:en|in|innen|e)?|pat|pa[cz]iente|pazienti|mrn",
    r"subje[ck]t|sujet|sujeto|soggetto|proband(?:en|in|innen)?|versuchsperson(?:en)?",
    r"participant|participante|partecipante|teilnehmer(?:in|innen)?",
    r"person(?:en)?|persona|personne",
    "individual", "donor", "animal", "case", "lesion", "specimen", "slide", "study", "exam",
)  # fmt: skip
"""What several samples may be of, in some languages; a column called after the first of them goes before a later's."""
_NUMBER = r"_?(id|ids|no|nr|num|number|nummer|numero|número|numéro|key|code|uid|name|hash|kennung|kürzel|pseudonym)"


def likely_target(table: pl.DataFrame, config: ManifestConfig) -> str:
    """The column that is most likely the target: called so, or else the first with a few classes; '' if there is none.

    Args:
        table: of the manifest, a row per sample.
        config: how it was read, which says what columns hold images.
    """
    taken = {"sample_id", config.id, config.view_column, config.path_column, *_columns(config)}
    free = [name for name in table.columns if name not in taken and name.lower() not in DIVIDES]
    few = [name for name in free if 2 <= table[name].drop_nulls().n_unique() <= min(MOST_CLASSES, table.height // 2)]
    return next((name for name in few if name.lower() in NAMED), few[0] if few else "")


def likely_group(table: pl.DataFrame, taken: Collection[str] = ()) -> str | None:
    """The column that most likely says which samples are of one patient, or of one of the other `OWNERS`.

    It is called so (`patient`, `PatientID`, `Patienten-Nr.`, `case_no`), and several samples share a value, yet there
    are too many values for a few classes: 10 where its name says that it numbers them, else more than `MOST_CLASSES`,
    or a third of the samples.

    Args:
        table: of the manifest, a row per sample.
        taken: columns that are something else.
    """
    for owner in OWNERS:
        for column in table.columns:
            name = re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", column)).lower().strip("_")
            called = re.search(rf"(^|_)(?:{owner})s?({_NUMBER})?$", name)
            values = table[column].drop_nulls()
            if called is None or column in taken or values.dtype.is_float() or values.dtype.is_nested():
                continue
            distinct, least = values.n_unique(), 10 if called[2] else MOST_CLASSES + 1
            if distinct < len(values) and (distinct >= least or 3 * distinct >= len(values)):
                return column
    return None


def _columns(config: ManifestConfig) -> Iterable[str]:
    for named in config.views.values():
        yield from str(named).split(",")
    yield from (column for column, _ in selector_columns(config))
