"""Writers without torch, each a fork of one small process, that tests kill or starve of disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

TYPED, UNTYPED = 3, 70
"""Exit statuses of a writer: an error of featurecache's, and any other one (its text is in `Writer.error`)."""


class Writers:
    """The process that forks a writer for each question; `preload` is a library for LD_PRELOAD."""

    def __init__(self, preload: Path | None = None) -> None:
        environment = {**os.environ, **({"LD_PRELOAD": str(preload)} if preload else {})}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def ask(self, **question: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(question).encode() + b"\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, path: Path, rows: int, **options: Any) -> Writer:
        """Begin to write `rows` known rows; options: `die_at` (the number of a step), `fault` (what the disk does)."""
        return Writer(self, self.ask(path=str(path), rows=rows, **options), path)

    def run(self, path: Path, rows: int, **options: Any) -> Writer:
        writer = self.start(path, rows, **options)
        writer.wait()
        return writer


class Writer:
    """One writer; `status` is negative for a signal."""

    def __init__(self, writers: Writers, pid: int, path: Path) -> None:
        self._writers, self.pid, self._path = writers, pid, path
        self.status: int | None = None

    def wait(self) -> int:
        if self.status is None:
            self.status = self._writers.ask(wait=self.pid)
        assert self.status is not None
        return self.status

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL; whether it was still at work."""
        time.sleep(seconds)
        os.kill(self.pid, signal.SIGKILL)  # at worst a zombie: nobody has waited for it
        return self.wait() == -signal.SIGKILL

    @property
    def error(self) -> str:
        """What it said when it ended with an error."""
        return self._path.with_suffix(".error").read_text(encoding="utf-8")

    @property
    def events(self) -> int:
        """Operations that were counted while it ran to its end."""
        return int(self._path.with_suffix(".events").read_text(encoding="utf-8"))


# ---- in the server and its forks -------------------------------------------------------------------------------------


def write(question: dict[str, Any]) -> int:
    from store_kit import write_known

    from featurecache.errors import FeatureCacheError

    path, events = Path(question["path"]), 0

    def count(step: str) -> None:
        nonlocal events
        events += 1
        if events == question.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    library: Any = None
    if "fault" in question:
        import ctypes

        library = ctypes.CDLL(None)
        library.fault_arm(str(path).encode(), *question["fault"])
    try:
        write_known(path, question["rows"], count)
        return 0
    except FeatureCacheError as error:
        path.with_suffix(".error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        return TYPED
    except BaseException:
        path.with_suffix(".error").write_text(traceback.format_exc(), encoding="utf-8")
        return UNTYPED
    finally:
        path.with_suffix(".events").write_text(str(library.fault_seen() if library else events), encoding="utf-8")


def serve() -> None:
    import store_kit  # noqa: F401  what the forks need is imported once

    assert "torch" not in sys.modules
    for line in sys.stdin.buffer:
        question = json.loads(line)
        if "wait" in question:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                status = UNTYPED
                try:
                    status = write(question)
                finally:
                    os._exit(status)
        os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    serve()
