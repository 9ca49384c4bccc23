"""What the plugins of serving stacks share: merging partials of an engine's own group, by the engine's conventions."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from treeattn import _abi
from treeattn.torch import Comm, Plan

# Most rows of a step. Plans are made once and never grow, since a workspace that grows poisons captured graphs.
MAX_TOKENS = int(os.environ.get("TREEATTN_MAX_TOKENS", "1024"))
_comms: dict[Any, Comm] = {}
_plans: dict[Any, Plan] = {}


def merged(
    out: torch.Tensor,
    lse: torch.Tensor,
    group: Any,
    *,
    scattered: bool,
    base_e: bool,
    seq_lens: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The merge of all ranks' partials, out [token, head, dim] and lse [token, head], as the engine's own calls give it.

    An lse of NaN, +inf or -inf means that there were no keys, and such a row of `out` is never read. `seq_lens` (this rank's) and
    `query_start_loc` tell more of them: rows of sequences without keys, and padding behind the last sequence.

    @param group    the engine's coordinator: `world_size`, and `device_group` or, of CPU tensors, `cpu_group`. The first call for a
                    group and a shape is collective and makes communicator and plan: the engine's warm-up, not a capture.
    @param scattered each rank gets its own heads; else all get all.
    @return out, and the lse in the base of the incoming one.
    """
    tokens, heads, dim = out.shape
    if scattered and heads % group.world_size:
        raise ValueError(f"{heads} heads do not divide over {group.world_size} ranks")
    if tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} rows in a step; TREEATTN_MAX_TOKENS is {MAX_TOKENS}")
    plan = _plan(group, out, heads, dim, scattered)
    base = 0 if base_e else 2
    arrays = {"kv_length": seq_lens, "query_start": query_start_loc}
    told = {name: array.to(torch.int32) for name, array in arrays.items() if array is not None}
    flags = _abi.MERGE_PLUS_INF_IS_EMPTY | _abi.MERGE_NAN_IS_EMPTY
    return plan.merge(out, lse.to(torch.float32), lse_base=base, out_lse_base=base, flags=flags, **told)


def _plan(group: Any, out: torch.Tensor, heads: int, dim: int, scattered: bool) -> Plan:
    pg = group.device_group if out.is_cuda else group.cpu_group
    key = (id(group), out.device, heads, dim, out.dtype, scattered)
    plan = _plans.get(key)
    if plan is None:
        comm = _comms.get(key[:2])
        if comm is None:
            comm = _comms[key[:2]] = Comm.from_process_group(pg, device=out.device)
            comm.engine_group = group  # so that its id is not another group's
        plan = _plans[key] = comm.plan(
            q_heads=heads,
            kv_heads=0,
            head_dim_v=dim,
            max_query_tokens=MAX_TOKENS,
            out_dtype=str(out.dtype).rpartition(".")[2],
            output="scattered" if scattered else "replicated",
        )
    return plan


def replace(package: str, name: str, original: Any, replacement: Any) -> int:
    """Puts a function in the place of another in every loaded module of a package; how many had it."""
    count = 0
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").split(".")[0] == package and getattr(module, name, None) is original:
            setattr(module, name, replacement)
            count += 1
    return count


def close() -> None:
    """Destroys all plans and communicators of this module."""
    for made in (*_plans.values(), *_comms.values()):
        made.close()
    _plans.clear()
    _comms.clear()
