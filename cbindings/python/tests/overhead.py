"""What a call costs in Python: `python overhead.py`. One rank, one key, one head of 8, so that the step itself is next to nothing.

Prints microseconds a call, the medians of runs of a thousand: the C call with its arguments ready, as ctypes makes it; an op that
does nothing; and steps by a plan's methods and by torch's ops, into tensors of the caller's and into new ones.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable

import torch

import treeattn
import treeattn.torch


def micros(call: Callable[[], object]) -> float:
    times = []
    for _ in range(21):
        begin = time.perf_counter()
        for _ in range(1000):
            call()
        times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times)


def main() -> None:
    (comm,) = treeattn.torch.Comm.local([treeattn.cpu()], threads_per_rank=1)
    plan = comm.plan(q_heads=1, kv_heads=1, head_dim_qk=8, max_batch=1, max_query_tokens=1, max_kv_length=8)
    q, k = torch.zeros(1, 1, 8), torch.zeros(1, 8, 1, 8)
    length, out, lse = torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, 8), torch.zeros(1, 1)
    plan.decode_into(q, k, k, length, out, lse)
    (step,) = plan._steps.values()
    library = torch.library.Library("treeattn_overhead", "DEF")
    library.define("nothing(Tensor q, Tensor k, Tensor v, Tensor l, int plan, Tensor(a!) out, Tensor(b!) lse) -> ()")
    library.impl("nothing", lambda *_: None, "CPU")
    nothing = torch.ops.treeattn_overhead.nothing
    ready = micros(lambda: step.function(plan._handle, step.ref, None))
    empty = micros(lambda: nothing(q, k, k, length, plan.id, out, lse))
    calls = {
        "decode_into": lambda: plan.decode_into(q, k, k, length, out, lse),
        "decode": lambda: plan.decode(q, k, k, length),
        "treeattn::decode_into": lambda: torch.ops.treeattn.decode_into(q, k, k, length, plan.id, out, lse),
        "treeattn::decode": lambda: torch.ops.treeattn.decode(q, k, k, length, plan.id),
    }
    print(f"C call, arguments ready  {ready:6.2f}")
    print(f"an op that does nothing  {empty:6.2f}")
    for name, call in calls.items():
        time_of = micros(call)
        print(f"{name:24s} {time_of:6.2f}  ({time_of - ready:.2f} above the C call)")


if __name__ == "__main__":
    main()
