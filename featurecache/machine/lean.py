"""torchvision, imported without the compiler of torch, which no command needs and which takes as long as torch itself.

`torchvision.ops.roi_align` imports one function of `torch._dynamo.utils`, and with it the compiler, sympy and
torch.distributed: 2 of the 5 s of `import torchvision`. While torchvision is imported here, a stand-in module gives it
a function that fetches the real one when it is called. The stand-in is then gone: whoever imports the compiler later,
torch.compile and torch.export among them, gets the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

COMPILER, UTILITIES = "torch._dynamo", "torch._dynamo.utils"

__all__ = ["torchvision", "without_compiler"]


class _StandIn(ModuleType):
    """Has the one name that torchvision asks for; at any other the import fails, and is done plainly instead."""

    def __init__(self) -> None:
        super().__init__(UTILITIES, "Stands in for the compiler's helpers while torchvision is imported.")
        self.is_compile_supported = is_compile_supported


def is_compile_supported(device_type: Any) -> Any:
    """`torch._dynamo.utils.is_compile_supported`, imported when it is first called."""
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device_type)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Within it, `import torchvision` does not load `torch._dynamo`; no effect where that is loaded already."""
    import torch  # noqa: F401  torch itself must see no stand-in

    if COMPILER in sys.modules or UTILITIES in sys.modules:
        yield
        return
    stand_in = _StandIn()
    sys.modules[UTILITIES] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(UTILITIES) is stand_in:
            del sys.modules[UTILITIES]


try:
    with without_compiler():
        import torchvision
except (ImportError, AttributeError):  # a torchvision that asks for more: plainly, with whatever it needs
    import torchvision
