"""A plugin for vLLM: the merges of decode context parallelism by this library.

Written for vLLM 0.33, and tested against stand-ins of that version's signatures; it was not run in vLLM.

Where the wheel is installed vLLM finds it by its entry point (`vllm.general_plugins`). With TREEATTN_VLLM=on in the environment
`register` puts the functions below in the place of vLLM's own of the same names, in every module that holds them; else it does
nothing. Rows of a step are at most TREEATTN_MAX_TOKENS (1,024).
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch

from treeattn._engines import merged, replace


def _answer(out: torch.Tensor, lse: torch.Tensor, return_lse: bool) -> Any:
    return (out, lse) if return_lse else out


def cp_lse_ag_out_rs(
    cp_attn_out: torch.Tensor,
    cp_attn_lse: torch.Tensor,
    cp_group: Any,
    ctx: Any = None,
    return_lse: bool = False,
    is_lse_base_on_e: bool = True,
    seq_lens: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
) -> Any:
    """[B, H, D] and [B, H] of every rank, merged: [B, H/N, D], the rank's own heads, and their lse with `return_lse`."""
    if cp_group.world_size == 1:
        return _answer(cp_attn_out, cp_attn_lse, return_lse)
    found = merged(cp_attn_out, cp_attn_lse, cp_group, scattered=True, base_e=is_lse_base_on_e, seq_lens=seq_lens,
                   query_start_loc=query_start_loc)  # fmt: skip
    return _answer(*found, return_lse)


def cp_lse_ag_out_ar(
    cp_attn_out: torch.Tensor,
    cp_attn_lse: torch.Tensor,
    cp_group: Any,
    ctx: Any = None,
    return_lse: bool = False,
    is_lse_base_on_e: bool = True,
    seq_lens: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
) -> Any:
    """As `cp_lse_ag_out_rs`, with all heads on every rank."""
    if cp_group.world_size == 1:
        return _answer(cp_attn_out, cp_attn_lse, return_lse)
    found = merged(cp_attn_out, cp_attn_lse, cp_group, scattered=False, base_e=is_lse_base_on_e, seq_lens=seq_lens,
                   query_start_loc=query_start_loc)  # fmt: skip
    return _answer(*found, return_lse)


# The call by all-to-all has the same contract; how the bytes travel is the library's affair.
dcp_a2a_lse_reduce = cp_lse_ag_out_rs

_MODULES = ("vllm.v1.attention.ops.common", "vllm.v1.attention.ops.dcp_alltoall", "vllm.v1.attention.ops.dcp")
_NAMES = {name: globals()[name] for name in ("cp_lse_ag_out_rs", "cp_lse_ag_out_ar", "dcp_a2a_lse_reduce")}


def _init_combine(self: Any, num_heads: int, head_dim: int, dtype: torch.dtype, is_lse_base_on_e: bool, use_pcp: bool) -> Any:
    """`MLADCPManager._init_combine`: MLA's merge by this library, in place of vLLM's workspace of direct stores."""
    combine = cp_lse_ag_out_ar if use_pcp else cp_lse_ag_out_rs
    return functools.partial(combine, cp_group=self.group, is_lse_base_on_e=is_lse_base_on_e)


def register() -> None:
    """The entry point. Does nothing the second time.

    @raises ImportError: TREEATTN_VLLM is on, and vLLM has none of the functions where this version looks.
    """
    if os.environ.get("TREEATTN_VLLM") != "on":
        return
    found = 0
    for path in _MODULES:
        try:
            module = importlib.import_module(path)
        except ImportError:
            continue
        for name, replacement in _NAMES.items():
            original = getattr(module, name, None)
            if original is not None and original is not replacement:
                replace("vllm", name, original, replacement)
            found += original is not None
        manager = getattr(module, "MLADCPManager", None)
        if manager is not None:
            manager._init_combine = _init_combine
    if not found:
        raise ImportError(f"TREEATTN_VLLM is on, and none of {', '.join(_NAMES)} is in {', '.join(_MODULES)}")
