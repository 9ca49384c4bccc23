"""What the tests share: attention in float64, bounds, and tensors without NumPy or torch."""

from __future__ import annotations

import array
import math
import random

INFINITY = math.inf


def tensor(shape: tuple[int, ...], values: list[float] | None = None, kind: str = "f") -> memoryview:
    """A packed tensor of f32 ("f") or int32 ("i") that may be written."""
    size = math.prod(shape)
    memory = memoryview(array.array(kind, values if values is not None else [0] * size))
    return memory.cast("B").cast(kind, shape) if size else memory


def numbers(generator: random.Random, count: int, scale: float = 1.0) -> list[float]:
    """Random f32 values."""
    return array.array("f", [scale * generator.uniform(-1, 1) for _ in range(count)]).tolist()


def attend(q: list[float], keys: list[list[float]], values: list[list[float]], scale: float) -> tuple[list[float], float]:
    """One row in float64: output and natural log-sum-exp. No key: 0 and -inf."""
    if not keys:
        return [], -INFINITY
    scores = [scale * math.fsum(a * b for a, b in zip(q, key)) for key in keys]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = math.fsum(weights)
    out = [math.fsum(w * value[i] for w, value in zip(weights, values)) / total for i in range(len(values[0]))]
    return out, top + math.log(total)


def merge(partials: list[tuple[list[float], float]], dim: int) -> tuple[list[float], float]:
    """Partials in float64; an lse of -inf is an empty one, whose output is not read."""
    live = [(o, lse) for o, lse in partials if lse != -INFINITY]
    if not live:
        return [0.0] * dim, -INFINITY
    top = max(lse for _, lse in live)
    weights = [math.exp(lse - top) for _, lse in live]
    total = math.fsum(weights)
    return [math.fsum(w * o[i] for w, (o, _) in zip(weights, live)) / total for i in range(dim)], top + math.log(total)
