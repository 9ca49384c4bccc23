"""What the cases of torch's ranks share: the shape, ways to hold what was found against what was wanted, and how they are run."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Sequence

import torch

HEADS, KV_HEADS, DIM = 8, 2, 64
EMPTY = -math.inf


def expect(holds: bool, what: object) -> None:
    if not holds:
        raise AssertionError(what)


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    """Equal where the wanted value is no finite number, else within the bound."""
    found, wanted = found.double(), wanted.double()
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound, equal_nan=True)


def refused(kind: type[Exception], text: str, call: Callable[..., object], *arguments: object, **fields: object) -> None:
    """The call raises that, with a message that has the text."""
    try:
        call(*arguments, **fields)
    except kind as error:
        expect(re.search(text, str(error)) is not None, str(error))
    else:
        raise AssertionError(f"taken, where {text!r} was wanted")


def run(cases: object, names: Sequence[str]) -> None:
    """Runs the cases of these names, says so, and ends the process: peers of a lost rank cannot take their groups apart together."""
    for name in names:
        began = time.monotonic()
        getattr(cases, name)()
        print(f"{name} took {time.monotonic() - began:.2f} s")
        print(f"passed {name}", flush=True)
    os._exit(0)
