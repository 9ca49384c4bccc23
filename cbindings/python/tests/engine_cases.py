"""The plugins of serving stacks against stand-ins: modules of the engines' names, with functions of their signatures."""

from __future__ import annotations

import math
import os
import sys
import types

import torch
import torch.distributed as dist

import treeattn._engines
import treeattn.sglang
import treeattn.vllm
from checks import DIM, EMPTY, HEADS, close, expect


class Engines:
    rank: int
    world: int

    def group(self) -> types.SimpleNamespace:
        """What the engines' coordinators have, as far as the plugins look."""
        pg = dist.group.WORLD
        return types.SimpleNamespace(world_size=self.world, rank_in_group=self.rank, device_group=pg, cpu_group=pg)

    def stand_in(self, name: str, **names: object) -> types.ModuleType:
        """A module of an engine, in sys.modules, packages and all."""
        path = name.split(".")
        for depth in range(1, len(path) + 1):
            part = ".".join(path[:depth])
            if part not in sys.modules:
                sys.modules[part] = types.ModuleType(part)
                sys.modules[part].__path__ = []
        for key, value in names.items():
            setattr(sys.modules[name], key, value)
        return sys.modules[name]

    def partials(self) -> tuple:
        make = torch.Generator().manual_seed(9)
        o, lse = torch.randn(self.world, 6, HEADS, DIM, generator=make), torch.randn(self.world, 6, HEADS, generator=make)
        lse[0, 1] = math.nan
        lse[:, 2] = math.inf
        kept = torch.where(lse.isnan() | (lse == math.inf), EMPTY, lse)
        o[kept == EMPTY] = math.nan
        total = kept.double().logsumexp(0)
        truth = torch.einsum("nth,nthd->thd", torch.nan_to_num((kept.double() - total).exp()), torch.nan_to_num(o.double()))
        return o[self.rank], lse[self.rank], truth, total

    def vllm_plugin(self) -> None:
        def cp_lse_ag_out_rs(cp_attn_out, cp_attn_lse, cp_group, ctx=None, return_lse=False, is_lse_base_on_e=True, seq_lens=None,
                             query_start_loc=None):  # fmt: skip
            raise AssertionError("vLLM's own function was called")

        def cp_lse_ag_out_ar(cp_attn_out, cp_attn_lse, cp_group, ctx=None, return_lse=False, is_lse_base_on_e=True, seq_lens=None,
                             query_start_loc=None):  # fmt: skip
            raise AssertionError("vLLM's own function was called")

        class MLADCPManager:
            def __init__(self, group):
                self.group = group

            def _init_combine(self, num_heads, head_dim, dtype, is_lse_base_on_e, use_pcp):
                raise AssertionError("vLLM's own method was called")

        self.stand_in("vllm.v1.attention.ops.common", cp_lse_ag_out_rs=cp_lse_ag_out_rs, cp_lse_ag_out_ar=cp_lse_ag_out_ar)
        self.stand_in("vllm.v1.attention.ops.dcp", MLADCPManager=MLADCPManager)
        backend = self.stand_in("vllm.v1.attention.backends.flash_attn", cp_lse_ag_out_rs=cp_lse_ag_out_rs)
        treeattn.vllm.register()
        expect(backend.cp_lse_ag_out_rs is cp_lse_ag_out_rs, "replaced without being asked to")
        os.environ["TREEATTN_VLLM"] = "on"
        treeattn.vllm.register()
        treeattn.vllm.register()
        o, lse, truth, total = self.partials()
        group, half = self.group(), HEADS // self.world
        own = slice(half * self.rank, half * (self.rank + 1))
        out, out_lse = backend.cp_lse_ag_out_rs(o, lse.t().contiguous().t(), group, return_lse=True)
        close(out, truth[:, own], 5e-6)
        close(out_lse, total[:, own], 5e-6)
        common = sys.modules["vllm.v1.attention.ops.common"]
        out, out_lse = common.cp_lse_ag_out_ar(o, lse / math.log(2), group, None, True, False)
        close(out, truth, 5e-6)
        close(out_lse, total / math.log(2), 5e-6)
        combine = MLADCPManager(group)._init_combine(HEADS, DIM, torch.float32, True, False)
        close(combine(o, lse), truth[:, own], 5e-6)
        # Rows 0 and 1 are a sequence with keys here, 3 is one without, 4 and 5 are padding.
        out, out_lse = common.cp_lse_ag_out_rs(torch.ones(6, HEADS, DIM), torch.zeros(6, HEADS), group, return_lse=True,
                                               seq_lens=torch.tensor([9, 4, 0]), query_start_loc=torch.tensor([0, 2, 3, 4]))  # fmt: skip
        expect((out_lse[:, 0] == EMPTY).tolist() == [False] * 3 + [True] * 3, out_lse)
        expect(out[:, 0, 0].tolist() == [1.0] * 3 + [0.0] * 3, out)
        treeattn._engines.close()

    def sglang_plugin(self) -> None:
        def dcp_a2a_lse_reduce(cp_attn_out, cp_attn_lse, cp_group, is_lse_base_on_e=True, cuda_graph_buffers=None, comm_backend="a2a"):
            raise AssertionError("SGLang's own function was called")

        hooks = {}
        registry = types.SimpleNamespace(register=lambda target, call, kind: hooks.update({target: (call, kind)}))
        self.stand_in("sglang.srt.plugins.hook_registry", HookRegistry=registry, HookType=types.SimpleNamespace(REPLACE="replace"))
        package = self.stand_in("sglang.srt.layers.dcp")
        self.stand_in("sglang.srt.layers.dcp.comm", dcp_a2a_lse_reduce=dcp_a2a_lse_reduce)
        dcp_a2a_lse_reduce.__module__ = "sglang.srt.layers.dcp.comm"
        listed, treeattn.sglang.pkgutil = treeattn.sglang.pkgutil, types.SimpleNamespace(
            iter_modules=lambda path: [types.SimpleNamespace(name="comm")] if path is package.__path__ else []
        )
        treeattn.sglang.register()
        expect(not hooks, "hooked without being asked to")
        os.environ["TREEATTN_SGLANG"] = "on"
        treeattn.sglang.register()
        treeattn.sglang.pkgutil = listed
        ((target, (call, kind)),) = hooks.items()
        expect((target, kind) == ("sglang.srt.layers.dcp.comm.dcp_a2a_lse_reduce", "replace"), hooks)
        o, lse, truth, _ = self.partials()
        group, half = self.group(), HEADS // self.world
        own = slice(half * self.rank, half * (self.rank + 1))
        close(call(o, lse, group, is_lse_base_on_e=True, cuda_graph_buffers={}, comm_backend="a2a"), truth[:, own], 5e-6)
        out = treeattn.sglang.cp_lse_ag_out_rs_mla(o, lse / math.log(2), group)
        close(out, truth[:, own].transpose(0, 1), 5e-6)
        treeattn._engines.close()
