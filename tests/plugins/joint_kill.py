"""A joint training in a process of its own, killed when it comes to a point of its progress."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch
from featurecache.config import JointConfig
from featurecache.joint.finetune import finetune_joint
from featurecache.progress import Silent

class Tell(Silent):
    def begin(self, task, total, unit="images"):
        self.steps = 0
        print(task, flush=True)

    def advance(self, task, n=1, *, status=""):
        self.steps += 1
        print(task, "step", self.steps, flush=True)

torch.set_num_threads(1)
finetune_joint(JointConfig.from_toml(sys.argv[1]), reporter=Tell())
"""


def kill_at(config, settings, at):
    """Train by a config, which is written to a file, until a line of progress starts with `at`."""
    settings.write_text(config.to_toml())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", SCRIPT, str(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith(at):
                process.kill()
                break
    assert process.returncode == -9
    assert not config.out.exists()
