"""A plugin for SGLang: the merges of decode context parallelism by this library.

Written for SGLang 0.5.23, and tested against stand-ins of that version's signatures; it was not run in SGLang.

Where the wheel is installed SGLang finds it by its entry point (`sglang.srt.plugins`). With TREEATTN_SGLANG=on in the environment
`register` has SGLang's hook registry put the functions below in the place of its own; else it does nothing. Rows of a step are at
most TREEATTN_MAX_TOKENS (1,024).
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from typing import Any

import torch

from treeattn._engines import merged


def dcp_a2a_lse_reduce(
    cp_attn_out: torch.Tensor,
    cp_attn_lse: torch.Tensor,
    cp_group: Any,
    is_lse_base_on_e: bool = True,
    cuda_graph_buffers: dict | None = None,
    comm_backend: str = "a2a",
) -> torch.Tensor:
    """[B, H, D] and [B, H] of every rank, merged: [B, H/N, D], the rank's own heads. The buffers are not needed."""
    if cp_group.world_size == 1:
        return cp_attn_out
    return merged(cp_attn_out, cp_attn_lse, cp_group, scattered=True, base_e=is_lse_base_on_e)[0]


def cp_lse_ag_out_rs_mla(
    cp_attn_out: torch.Tensor,
    cp_attn_lse: torch.Tensor,
    cp_group: Any,
    ctx: Any = None,
    is_lse_base_on_e: bool = False,
) -> torch.Tensor:
    """As `dcp_a2a_lse_reduce`, by heads first: [H/N, B, D]. Versions without `ctx` have the base in its place."""
    if isinstance(ctx, bool):
        is_lse_base_on_e = ctx
    if cp_group.world_size == 1:
        return cp_attn_out
    return merged(cp_attn_out, cp_attn_lse, cp_group, scattered=True, base_e=is_lse_base_on_e)[0].transpose(0, 1)


# The package whose modules define the functions, and the functions.
_PACKAGE = "sglang.srt.layers.dcp"
_FUNCTIONS = (dcp_a2a_lse_reduce, cp_lse_ag_out_rs_mla)


def register() -> None:
    """The entry point: hooks both functions in the modules of SGLang that define them.

    @raises ImportError: TREEATTN_SGLANG is on, and SGLang has none of the functions where this version looks.
    """
    if os.environ.get("TREEATTN_SGLANG") != "on":
        return
    hooked = 0
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    package = importlib.import_module(_PACKAGE)
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{_PACKAGE}.{found.name}")
        for replacement in _FUNCTIONS:
            original = getattr(module, replacement.__name__, None)
            if original is not None and original.__module__ == module.__name__:
                target = f"{module.__name__}.{replacement.__name__}"
                registry.HookRegistry.register(target, replacement, registry.HookType.REPLACE)
                hooked += 1
    if not hooked:
        raise ImportError(f"TREEATTN_SGLANG is on, and no module of {_PACKAGE} has one of the functions")
