"""Runs the fault cases, slow ones included, and prints what was survived, failed and found as one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/faults", "tests/store/test_kill.py", "tests/store/test_rebuild.py", "tests/store/test_lock.py",
    "tests/test_kill.py",
)  # fmt: skip


def main() -> int:
    """Run them; the exit status is that of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures"
        environment = {**os.environ, "FEATURECACHE_FAULTS": str(figures)}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", *TESTS]
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False).returncode
        lines = figures.read_text(encoding="utf-8").splitlines() if figures.is_file() else []
    total: Counter[str] = Counter()
    for line in lines:
        total.update(json.loads(line))
    kills = sum(count for name, count in total.items() if name.endswith("kills_survived"))
    flips = sum(count for name, count in total.items() if "_flips_" in name)
    print(json.dumps({"passed": status == 0, "kills_survived": kills, "bits_flipped": flips, **dict(total)}))
    return status


if __name__ == "__main__":
    sys.exit(main())
