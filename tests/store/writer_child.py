"""A writer without torch that feeds known features, for tests that kill it. Arguments: STORE ROWS."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import write_known

assert "torch" not in sys.modules


def opened(step: str) -> None:
    if step == "leftovers-trashed":
        print("writing", flush=True)


write_known(Path(sys.argv[1]), int(sys.argv[2]), opened)
