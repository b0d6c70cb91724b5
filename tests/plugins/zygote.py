"""Commands in forks of one process that has everything imported: a start takes milliseconds instead of seconds."""

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


class Zygote:
    """Starts real processes that run `featurecache WORDS`; signals reach them as they would the installed command."""

    def __init__(self) -> None:
        from extract_kit import command_environment

        environment = {**command_environment(), "PYTHONHASHSEED": "4321"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)
        assert self._server.stdout is not None
        self._server.stdout.close()

    def start(self, folder: Path, *words: Any) -> Process:
        folder.mkdir(parents=True, exist_ok=True)
        pid = self.ask({"words": [str(word) for word in words], "out": f"{folder}/out", "err": f"{folder}/err"})
        return Process(self, pid, folder)

    def run(self, folder: Path, *words: Any) -> Process:
        process = self.start(folder, *words)
        process.wait()
        return process

    def ask(self, question: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(question).encode() + b"\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


class Process:
    """One command under way; `status` is that of subprocess: negative for a signal."""

    def __init__(self, zygote: Zygote, pid: int, folder: Path) -> None:
        self.zygote, self.pid, self.folder = zygote, pid, folder
        self.status: int | None = None

    def poll(self, *, block: bool = False) -> int | None:
        if self.status is None:
            self.status = self.zygote.ask({"wait": self.pid, "block": block})
        return self.status

    def wait(self) -> int:
        status = self.poll(block=True)
        assert status is not None
        return status

    def send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text(encoding="utf-8")


@cache
def shared() -> Zygote:
    """One for all tests of a session."""
    zygote = Zygote()
    atexit.register(zygote.close)
    return zygote


def child(question: dict[str, Any]) -> None:
    from featurecache.cli import main

    for name, number in (("out", 1), ("err", 2)):
        handle = os.open(question[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    sys.argv = ["featurecache", *question["words"]]
    status = 70
    try:
        main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    import torch

    import featurecache.cli
    import featurecache.extract
    import featurecache.stageone.dryrun  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin.buffer:
        question = json.loads(line)
        if "words" in question:
            pid = os.fork()
            if not pid:
                child(question)
            answer: int | None = pid
        else:
            pid, status = os.waitpid(question["wait"], 0 if question["block"] else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    serve()
