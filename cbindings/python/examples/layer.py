"""Attention of a layer under tensor and context parallelism: heads and cache are split over the same ranks (vLLM's TP n with DCP n).

    torchrun --nproc-per-node 2 layer.py            # GPUs only

Each rank has the queries of its own heads and its part of every sequence's keys, and needs the output of its own heads. The same
local kernel, this library's, serves all; bf16, replayed graphs, caches that are not in L2 (steps go around several).

    fused      one step of this library: queries in scattered, output scattered
    gathered   NCCL's allgather of queries, then a step of this library with scattered output
    a2a        as vLLM does it: allgather of queries, local attention, all-to-all of outputs and lse, a merge kernel
    rs         as vLLM does it: allgather of queries, local attention, allgather of lse, a correction kernel, reduce-scatter

The kernels of a2a and rs between NCCL's are one each (torch.compile). Ends with 1 where outputs differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

import treeattn.torch

HEADS, KV_HEADS, DIM = 32, 8, 128
CACHES = 300 << 20  # bytes that steps go around, many times L2
SHAPES = [(1, 8192), (1, 65536), (1, 262144), (1, 1048576), (8, 8192), (8, 65536), (32, 8192), (32, 65536), (128, 8192)]


@torch.compile(dynamic=True)
def merge_received(o: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """o [rank, token, head, dim] and lse [rank, token, head] of all ranks' keys, merged."""
    weights = (lse - lse.amax(0)).exp()
    return ((o.float() * weights[..., None]).sum(0) / weights.sum(0)[..., None]).to(o.dtype)


@torch.compile(dynamic=True)
def corrected(o: torch.Tensor, lse: torch.Tensor, all_lse: torch.Tensor) -> torch.Tensor:
    """A rank's o [token, head, dim] by its weight among all ranks' lse [rank, token, head], heads first, as reduce-scatter takes it."""
    top = all_lse.amax(0)
    weight = (lse - top).exp() / (all_lse - top).exp().sum(0)
    return (o.float() * weight[..., None]).to(o.dtype).transpose(0, 1).contiguous()


class Layer:
    """What all ways share: tensors of a batch, and plans."""

    def __init__(self, comm: treeattn.torch.Comm, batch: int, total: int) -> None:
        self.rank, self.world = comm.rank, comm.world
        self.held = total // self.world
        self.mine = HEADS // self.world
        torch.manual_seed(batch + total)
        self.queries = torch.randn(batch, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        self.q = self.queries[:, self.rank * self.mine : (self.rank + 1) * self.mine].contiguous()
        count = max(2, min(16, CACHES // (batch * self.held * KV_HEADS * DIM * 4)))
        torch.manual_seed(1000 * self.rank + batch)
        self.caches = [[torch.randn(batch, self.held, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in "kv"] for _ in range(count)]
        self.length = torch.full((batch,), self.held, dtype=torch.int32, device="cuda")
        self.received = torch.empty(self.world, batch, self.mine, DIM, device="cuda", dtype=torch.bfloat16)
        shape = {"q_heads": HEADS, "kv_heads": KV_HEADS, "head_dim_qk": DIM, "dtype": "bfloat16", "max_batch": batch,
                 "max_query_tokens": batch, "max_kv_length": self.held}  # fmt: skip
        self.plans = {
            "local": comm.plan(output="local", **shape),
            "gathered": comm.plan(output="scattered", **shape),
        }
        try:
            self.plans["fused"] = comm.plan(output="scattered", query_input="scattered", **shape)
        except treeattn.UnsupportedError as error:
            if self.rank == 0:
                print(f"fused: {error}")

    def gather_queries(self) -> torch.Tensor:
        dist.all_gather_into_tensor(self.received, self.q)
        return self.received.transpose(0, 1).reshape(len(self.q), HEADS, DIM)

    def local(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.plans["local"].decode(self.queries, k, v, self.length)

    def fused(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.plans["fused"].decode(self.q, k, v, self.length)[0]

    def gathered(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.plans["gathered"].decode(self.gather_queries(), k, v, self.length)[0]

    def a2a(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o, lse = self.plans["local"].decode(self.gather_queries(), k, v, self.length)
        parts = o.view(-1, self.world, self.mine, DIM).transpose(0, 1).contiguous()
        sums = lse.view(-1, self.world, self.mine).transpose(0, 1).contiguous()
        got, got_lse = torch.empty_like(parts), torch.empty_like(sums)
        dist.all_to_all_single(got, parts)
        dist.all_to_all_single(got_lse, sums)
        return merge_received(got, got_lse)

    def rs(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o, lse = self.plans["local"].decode(self.gather_queries(), k, v, self.length)
        every = torch.empty(self.world, *lse.shape, device="cuda")
        dist.all_gather_into_tensor(every, lse)
        out = torch.empty(self.mine, len(o), DIM, device="cuda", dtype=o.dtype)
        dist.reduce_scatter_tensor(out, corrected(o, lse, every))
        return out.transpose(0, 1)

    def close(self) -> None:
        for plan in self.plans.values():
            plan.close()


def microseconds(layer: Layer, call: Callable[..., object], replays: int) -> float:
    """The time of one call, by graphs that go around the caches twice: the median of replays, the slower rank's."""
    for cache in layer.caches[:2]:
        call(*cache)
    torch.cuda.synchronize()
    graph, steps = torch.cuda.CUDAGraph(), 2 * len(layer.caches)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(steps):
            call(*layer.caches[i % len(layer.caches)])
    times = []
    for _ in range(replays):
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / steps * 1e3)
    found = torch.tensor(statistics.median(times), device="cuda")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", type=lambda text: tuple(map(int, text.split("x"))), default=SHAPES, help="BATCHxTOTAL")
    args = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    comm = treeattn.torch.Comm.from_process_group()
    ways = ["local", "fused", "gathered", "a2a", "rs"]
    if rank == 0:
        print(f"us a layer, {HEADS}/{KV_HEADS} heads x {DIM}, bf16, {comm.world} x {torch.cuda.get_device_name()}, "
              f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")  # fmt: skip
        print(f"{'batch':>5} {'total keys':>10}" + "".join(f"{way:>10}" for way in ways))
    same = True
    for batch, total in args.shapes:
        layer = Layer(comm, batch, total)
        times: dict[str, float] = {}
        wanted = layer.gathered(*layer.caches[0]).float()
        for way in ways:
            if way == "fused" and "fused" not in layer.plans:
                continue
            call = getattr(layer, way)
            if way != "local":
                difference = float((call(*layer.caches[0]).float() - wanted).abs().max())
                if not difference < 0.02 * float(wanted.abs().max()):
                    same = False
                    print(f"rank {rank}: {way} differs by {difference}", flush=True)
            times[way] = microseconds(layer, call, args.replays)
        if rank == 0:
            print(f"{batch:5} {total:10}" + "".join(f"{times[way]:10.1f}" if way in times else f"{'-':>10}" for way in ways), flush=True)
        layer.close()
        del layer
        torch.cuda.empty_cache()
    comm.close()
    dist.destroy_process_group()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
