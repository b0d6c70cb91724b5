"""One thread for small matrix products: BLAS starts several for each, which then wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SMALL = 64 << 20  # bytes of the matrix that is multiplied over and over

_lock = threading.Lock()
_inside = 0
_limits: Any = None


@contextmanager
def one_thread(nbytes: int) -> Iterator[None]:
    """Within it BLAS has one thread, if the matrix is small; for the whole process, since it knows no other way.

    Measured with 865 x 1,024 by 9 on two busy cores: 5 to 10 ms of the processor with two threads, 1.4 with one.

    Args:
        nbytes: of the matrix.
    """
    global _inside, _limits
    if nbytes > SMALL:
        yield
        return
    # Late: scikit-learn brings it, and only fitting needs it.
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with _lock:
        _inside += 1
        if _inside == 1:
            _limits = threadpool_limits(limits=1, user_api="blas")
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _limits.restore_original_limits()
