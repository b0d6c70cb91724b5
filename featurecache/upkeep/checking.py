"""`verify` from end to end: rebuild and repair where asked for, check every byte, extract some rows once more."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurecache.amounts import counted, human_bytes
from featurecache.store.rebuild import RepairReport, rebuild_index
from featurecache.store.repair import repair as repair_store
from featurecache.store.verify import VerifyReport
from featurecache.store.verify import verify as verify_store

if TYPE_CHECKING:
    from featurecache.upkeep.recompute import Recomputation

_INDEX = ("index", "unknown", "keys", "rows")  # kinds of problems that only a new index helps against


@dataclass(frozen=True)
class Verification:
    """What was done to a store, what is wrong with it now, and how far its numbers have drifted.

    Attributes:
        path: of the store.
        report: what was checked, and what is wrong.
        mended: `rebuilt` and `repaired`, where asked for -> what that kept and dropped.
        drift: of rows that were extracted once more; None where that was not asked for, or the store is not sound.
    """

    path: Path
    report: VerifyReport
    mended: dict[str, RepairReport] = field(default_factory=dict)
    drift: Recomputation | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, and no number drifts beyond tolerance."""
        return self.report.ok and (self.drift is None or self.drift.ok)

    @property
    def dropped(self) -> int:
        """Rows that rebuild and repair took out of the index; the next extract computes them again."""
        return sum(report.dropped for report in self.mended.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rows_dropped": self.dropped,
            "files_trashed": sum(len(report.trashed) for report in self.mended.values()),
            "files_rewritten": sum(len(report.rewritten) for report in self.mended.values()),
            **self.report.to_json(),
            **({} if self.drift is None else self.drift.to_json()),
        }

    def lines(self) -> list[str]:
        """As a person reads it."""
        found, lines = self.report, []
        for what, report in self.mended.items():
            trashed = counted(len(report.trashed), "file")
            rows = f"{counted(report.kept, 'row')} kept, {report.dropped:,} dropped"
            lines += [f"{what:<9} {rows}, {trashed} to the trash", *(f"note      {note}" for note in report.notes)]
        counts = (counted(found.recipes, "recipe"), counted(found.chunks, "chunk"), counted(found.rows, "row"))
        lines += [f"checked   {', '.join(counts)}", f"          {human_bytes(found.bytes)} read"]
        lines += [f"wrong     {problem}" for problem in found.problems]
        lines += [f"note      {note}" for note in found.notes]
        lines.append("sound" if found.ok else counted(len(found.problems), "problem"))
        if self.drift is not None:
            lines += [line for recipe in self.drift.recipes for line in recipe.lines()]
            if not self.drift.ok:
                lines.append("drifted" if self.drift.recomputed else "no row could be recomputed")
        return lines

    @property
    def remedy(self) -> str:
        """The command that comes next, or ''."""
        if not self.report.ok:
            broken = any(problem.kind in _INDEX for problem in self.report.problems)
            return shlex.join(["featurecache", "verify", str(self.path), "--rebuild-index" if broken else "--repair"])
        return "the same `featurecache extract` as before computes the dropped rows again" * bool(self.dropped)

    def __str__(self) -> str:
        return "\n".join(self.lines())


def check(
    path: Path,
    *,
    repair: bool = False,
    rebuild: bool = False,
    recompute: int | None = None,
    seed: int = 0,
    device: str = "auto",
    trust: Sequence[str] = (),
) -> Verification:
    """Check every byte of a store against what was committed.

    Args:
        path: of the store; without `repair` and `rebuild` it is only read.
        repair: drop rows of damaged chunks before.
        rebuild: make the index anew from the features before.
        recompute: how many random rows to extract once more, if the store is sound.
        seed: of their draw.
        device: where bodies run for that.
        trust: factories that the user allows for that; nothing else that a store names is imported.

    Raises:
        InputError: there is no store at `path`, or `recompute` is below 1.
        StoreError: a part of the store is missing altogether, or can't be written; says what to do.
        LockedError: another process is writing, and something is to be mended.
    """
    mended = {}
    if rebuild:
        mended["rebuilt"] = rebuild_index(path)
    if repair:
        mended["repaired"] = repair_store(path)
    report, drift = verify_store(path), None
    if recompute is not None and report.ok:
        from featurecache.upkeep.recompute import recompute as extract_again  # imports torch

        drift = extract_again(path, recompute, seed=seed, device=device, trust=trust)
    return Verification(path, report, mended, drift)
