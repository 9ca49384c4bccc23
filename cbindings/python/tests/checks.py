"""What the cases of torch's ranks share: the shape, and ways to hold what was found against what was wanted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

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
