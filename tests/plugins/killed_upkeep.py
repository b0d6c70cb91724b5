"""Forks of one small process that drop things from a store and are killed at a named step.

Not forks of the test: polars, which has been used there, hangs in a child.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any


class Upkeep:
    """The process that forks one for each question."""

    def __init__(self) -> None:
        self._server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def killed(self, step: str, count: int, what: str, path: Path, *words: str) -> bool:
        """Do it in a process that is killed when the step is done for the `count`th time; False where it came through.

        Args:
            step: of files.STEPS, MAINTENANCE_STEPS, or `io:write` and the like.
            count: from 1.
            what: forget, rm, prune or compact.
            path: of the store.
            words: ids, names, or the new store and the dataset of its order.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        question = {"step": step, "count": count, "what": what, "path": str(path), "words": words}
        self._server.stdin.write(json.dumps(question).encode() + b"\n")
        self._server.stdin.flush()
        status = json.loads(self._server.stdout.readline())
        assert status in (0, -signal.SIGKILL), status
        return bool(status)


@cache
def shared() -> Upkeep:
    """One for all tests of a session."""
    upkeep = Upkeep()
    atexit.register(upkeep.close)
    return upkeep


def work(question: dict[str, Any]) -> None:
    from featurecache.dropping import carry_out
    from featurecache.forget import plan_forget
    from featurecache.maintenance import plan_prune, plan_rm
    from featurecache.store import files
    from featurecache.store.compact import compact
    from featurecache.store.store import FeatureStore

    left = question["count"]

    def kill(step: str) -> None:
        nonlocal left
        left -= step == question["step"]
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    path, words = Path(question["path"]), question["words"]
    files.hook = kill
    files.os.fsync = lambda descriptor: None  # type: ignore[attr-defined]
    if question["what"] == "compact":
        compact(path, words[0], order=words[1])
        return
    with FeatureStore(path) as store:
        plans = {
            "forget": lambda: plan_forget(store, words),
            "rm": lambda: plan_rm(store, words),
            "prune": lambda: plan_prune(store),
        }
        plan = plans[question["what"]]()
    carry_out(plan)


def serve() -> None:
    import featurecache.forget
    import featurecache.maintenance
    import featurecache.store.compact  # noqa: F401

    for line in sys.stdin.buffer:
        child = os.fork()
        if not child:
            try:
                work(json.loads(line))
                os._exit(0)
            finally:
                os._exit(70)
        os.write(1, json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode() + b"\n")


if __name__ == "__main__":
    serve()
