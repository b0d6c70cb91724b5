"""Forks of one process that do something to a store and are killed at a step of it.

Not forks of the test: polars, which has been used there, hangs in a child.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import traceback
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

    def killed(self, step: str, count: int, what: str, path: Path, *words: Any) -> bool:
        """Do it in a process that is killed when the step is done for the `count`th time; False where it came through.

        Args:
            step: of files.STEPS, MAINTENANCE_STEPS, or `io:write` and the like; '' for any.
            count: from 1.
            what: one of `store_actions`.
            path: of the store.
            words: its other arguments, plain values.
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
    import store_actions

    from featurecache.store import files

    left = question["count"]

    def kill(step: str) -> None:
        nonlocal left
        left -= question["step"] in ("", step)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    files.hook = kill
    files.os.fsync = lambda descriptor: None  # type: ignore[attr-defined]
    getattr(store_actions, question["what"])(Path(question["path"]), *question["words"])


def serve() -> None:
    import store_actions  # noqa: F401  what the forks need is imported once

    for line in sys.stdin.buffer:
        child = os.fork()
        if not child:
            try:
                work(json.loads(line))
                os._exit(0)
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(70)
        os.write(1, json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode() + b"\n")


if __name__ == "__main__":
    serve()
