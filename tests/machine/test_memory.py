import platform
import re
from pathlib import Path

import numpy as np
import pytest

from featurecache.machine.memory import give_back

MEGABYTE = 1 << 20


def resident():
    """Bytes of anonymous memory that this process holds."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to")
def test_what_was_freed_is_given_back():
    held = [np.ones(8192, np.uint8) for _ in range(40 * MEGABYTE // 8192)]
    before = resident()
    held = held[::50]  # what stays lies among what goes
    give_back()
    assert resident() < before - 30 * MEGABYTE
    assert all(array.all() for array in held)
