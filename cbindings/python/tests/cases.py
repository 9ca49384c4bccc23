"""One rank of test_torch_ranks.py: runs the cases that it is told, all ranks the same ones in the same order."""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
import time

import torch
import torch.distributed as dist

import treeattn
import treeattn.torch
from checks import DIM, EMPTY, HEADS, KV_HEADS, close, expect, refused, run
from engine_cases import Engines


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64: q [seq, head, dim], k and v [seq, token, kv head, dim], visible [seq, token]. No key: 0 and -inf."""
    group = q.shape[1] // k.shape[2]
    k, v = k.double().repeat_interleave(group, 2), v.double().repeat_interleave(group, 2)
    scores = torch.einsum("bhd,bthd->bht", q.double(), k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~visible[:, None], EMPTY)
    lse = scores.logsumexp(-1)
    weights = torch.nan_to_num((scores - lse[..., None]).exp())
    return torch.einsum("bht,bthd->bhd", weights, v), lse


class Problem:
    """Three sequences: of 37 keys, of 5, all of them on rank 0, and of none."""

    def __init__(self, rank: int, world: int, dtype: torch.dtype = torch.float32) -> None:
        make = torch.Generator().manual_seed(5)
        self.q = torch.randn(3, HEADS, DIM, generator=make).to(dtype)
        self.k, self.v = (torch.randn(3, 40, KV_HEADS, DIM, generator=make).to(dtype) for _ in range(2))
        cuts = [37 * r // world for r in range(world + 1)]
        self.begin = [cuts[rank], 0, 0]
        self.lengths = [cuts[rank + 1] - cuts[rank], 5 if rank == 0 else 0, 0]
        capacity = 40
        self.own_k, self.own_v = torch.full((3, capacity, KV_HEADS, DIM), math.nan, dtype=dtype), None
        self.own_v = self.own_k.clone()
        for s, (begin, length) in enumerate(zip(self.begin, self.lengths)):
            self.own_k[s, :length] = self.k[s, begin : begin + length]
            self.own_v[s, :length] = self.v[s, begin : begin + length]
        self.length = torch.tensor(self.lengths, dtype=torch.int32)
        self.whole = torch.tensor([37, 5, 0], dtype=torch.int32)
        self.truth = attention(self.q, self.k, self.v, torch.arange(40)[None] < self.whole[:, None])
        mine = torch.zeros(3, 40, dtype=torch.bool)
        for s in range(3):
            mine[s, self.begin[s] : self.begin[s] + self.lengths[s]] = True
        self.own_truth = attention(self.q, self.k, self.v, mine)

    @staticmethod
    def shape(dtype: str = "float32", **more: object) -> dict:
        return {"q_heads": HEADS, "kv_heads": KV_HEADS, "head_dim_qk": DIM, "dtype": dtype, "max_batch": 3, "max_query_tokens": 3,
                "max_kv_length": 64} | more  # fmt: skip


class Cases(Engines):
    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    @functools.cached_property
    def comm(self) -> treeattn.torch.Comm:
        return treeattn.torch.Comm.from_process_group()

    def decode(self) -> None:
        for name, dtype, bound in (("float32", torch.float32, 3e-6), ("bfloat16", torch.bfloat16, 1e-2), ("float16", torch.float16, 2e-3)):
            problem = Problem(self.rank, self.world, dtype)
            with self.comm.plan(**problem.shape(name)) as plan:
                out, lse = plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)
                close(out, problem.truth[0], bound)
                close(lse, problem.truth[1], 3e-6)
                # Other tensors of the same shapes, in memory of the caller's.
                again, again_lse = torch.full_like(out, math.nan), torch.full_like(lse, math.nan)
                plan.decode_into(problem.q.clone(), problem.own_k.clone(), problem.own_v, problem.length, again, again_lse)
                expect(torch.equal(again, out) and torch.equal(again_lse, lse), "the outputs differ")
                expect(plan.stats()["steps"] == 2, plan.stats())
        problem = Problem(self.rank, self.world)
        with self.comm.plan(**problem.shape(output="scattered")) as plan:
            first, count = treeattn.head_range(HEADS, self.world, self.rank)
            out, lse = plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)
            close(out, problem.truth[0][:, first : first + count], 3e-6)
        table = torch.tensor([[2, 0], [1, 3], [0, 0]], dtype=torch.int32)
        paged_k, paged_v = torch.full((4, 20, KV_HEADS, DIM), math.nan), torch.full((4, 20, KV_HEADS, DIM), math.nan)
        for s in range(2):
            for part in range(2):
                paged_k[table[s, part]] = problem.own_k[s, 20 * part : 20 * part + 20]
                paged_v[table[s, part]] = problem.own_v[s, 20 * part : 20 * part + 20]
        with self.comm.plan(**problem.shape(kv_layout="block_table", page_size=20, causal=1)) as plan:
            fields = {"block_table": table, "global_length": problem.whole}
            fields["kv_start"] = torch.tensor([problem.begin[0], 0 if self.rank == 0 else 5, 0], dtype=torch.int32)
            out, lse = plan.decode(problem.q, paged_k, paged_v, problem.length, **fields)
            # The query is the last token of its sequence, so that it sees all keys; that of the empty one has none.
            close(out[:2], problem.truth[0][:2], 3e-6)

    def inference(self) -> None:
        """What is made in inference mode, and kept, serves outside of it, and the other way round."""
        problem = Problem(self.rank, self.world)
        with torch.inference_mode():
            comm = treeattn.torch.Comm.from_process_group()
            plan = comm.plan(**problem.shape())
            large = plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)
        for mode in (False, True, False):
            with torch.inference_mode(mode):
                out, lse = plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)
                expect(torch.equal(out, large[0]) and out.is_inference() == mode, mode)
                close(out, problem.truth[0], 3e-6)
        comm.close()

    def partial_and_merge(self) -> None:
        problem = Problem(self.rank, self.world)
        with self.comm.plan(**problem.shape()) as plan:
            o, lse = plan.partial(problem.q, problem.own_k, problem.own_v, problem.length)
            close(o, problem.own_truth[0], 3e-6)
            close(lse, problem.own_truth[1], 3e-6)
            out, out_lse = plan.merge(o, lse)
            close(out, problem.truth[0], 3e-6)
            close(out_lse, problem.truth[1], 3e-6)

    def compiled(self) -> None:
        problem = Problem(self.rank, self.world)
        with self.comm.plan(**problem.shape()) as plan:

            def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
                out, lse = plan.decode(2 * q, k, v, length)
                o, own = plan.partial(2 * q, k, v, length)
                merged, _ = plan.merge(o, own)
                into, into_lse = torch.empty_like(out), torch.empty_like(lse)
                plan.decode_into(2 * q, k, v, length, into, into_lse)
                return torch.stack([out, merged, into]) + 1

            call = torch.compile(layer, fullgraph=True, backend="aot_eager")
            for _ in range(2):
                out, merged, into = call(problem.q / 2, problem.own_k, problem.own_v, problem.length) - 1
                for found in (out, merged, into):
                    close(found, problem.truth[0], 3e-6)
            if self.rank == 0:
                torch.library.opcheck(torch.ops.treeattn.partial, (problem.q, problem.own_k, problem.own_v, problem.length, plan.id),
                                      test_utils=("test_schema", "test_faketensor"))  # fmt: skip

        # One function for plans of two shapes, of which torch sees the second one's number as a value that varies.
        def step(plan: treeattn.torch.Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
            return plan.decode(q, k, v, length, global_length=problem.whole)[0] + 1

        call = torch.compile(step, fullgraph=True, backend="aot_eager")
        for dtype, bound in (("float32", 3e-6), ("bfloat16", 1e-2), ("float16", 2e-3)):
            problem = Problem(self.rank, self.world, getattr(torch, dtype))
            with self.comm.plan(**problem.shape(dtype)) as plan:
                close(call(plan, problem.q, problem.own_k, problem.own_v, problem.length) - 1, problem.truth[0], 3 * bound)

    def conventions(self) -> None:
        """What other kernels give: what stands for no keys, bases, (max, sum), by tokens or by heads first, and who tells of padding."""
        make = torch.Generator().manual_seed(7)
        o = torch.randn(self.world, 5, HEADS, DIM, generator=make)
        lse = 3 * torch.randn(self.world, 5, HEADS, generator=make)
        lse[0, 1], lse[:, 2], lse[1:, 3] = EMPTY, EMPTY, EMPTY
        lengths = (lse[self.rank, :, 0] != EMPTY).int() * 7
        weights = torch.nan_to_num((lse.double() - lse.double().logsumexp(0)).exp())
        o[lse == EMPTY] = math.nan
        truth = torch.einsum("nth,nthd->thd", weights, torch.nan_to_num(o.double())), lse.double().logsumexp(0)
        whole = torch.arange(6, dtype=torch.int32)
        plus, nan = treeattn.MERGE_PLUS_INF_IS_EMPTY, treeattn.MERGE_NAN_IS_EMPTY
        empties = [(EMPTY, 0, {}), (math.inf, plus, {}), (math.nan, nan, {}), (math.nan, plus | nan, {}),
                   (math.nan, 0, {"kv_length": lengths}), (5.0, 0, {"kv_length": lengths, "query_start": whole})]  # fmt: skip
        with self.comm.plan(q_heads=HEADS, kv_heads=0, head_dim_v=DIM, max_query_tokens=5) as plan:
            for (empty, flags, told), base, out_base, transposed, sums in itertools.product(empties, (0, 2), (0, 2), (False, True), (False, True)):
                mine, mine_o, fields = lse[self.rank] / (math.log(2) if base else 1), o[self.rank], dict(told)
                if sums:
                    # The maximum need not be one: any number that was subtracted from all scores.
                    total = torch.rand(5, HEADS, generator=torch.Generator().manual_seed(3)) + 0.5
                    mine, mine_o = mine - (total.log2() if base else total.log()), mine_o * total[..., None]
                    fields["sum"] = total
                mine = mine.masked_fill(lse[self.rank] == EMPTY, empty)
                if transposed:
                    mine = mine.t().contiguous().t()
                out, out_lse = plan.merge(mine_o, mine, lse_base=base, out_lse_base=out_base, flags=flags, **fields)
                close(out, truth[0], 5e-6)
                close(out_lse, truth[1] / (math.log(2) if out_base else 1), 5e-6)
            # A batch of fixed size, of which the last three rows are padding.
            start = torch.tensor([0, 1, 2], dtype=torch.int32)
            out, out_lse = plan.merge(o[self.rank], lse[self.rank], query_start=start)
            close(out[:2], truth[0][:2], 5e-6)
            expect(bool((out[2:] == 0).all() and (out_lse[2:] == EMPTY).all()), "padding rows")
            call = torch.compile(lambda o, lse: plan.merge(o, lse, query_start=start, flags=nan)[0] + 1, fullgraph=True, backend="aot_eager")
            close(call(o[self.rank], lse[self.rank]) - 1, out, 1e-6)
            mine = lse[self.rank].clone()
            if self.rank == 0:
                mine[4, 6] = math.nan
            out, out_lse = plan.merge(o[self.rank], mine)
            expect(out_lse.isnan().nonzero().tolist() == [[4, 6]], out_lse)
            expect(out.isnan().all(-1).nonzero().tolist() == [[4, 6]] and out.isnan().sum() == DIM, "NaN in other rows")

    def padding(self) -> None:
        """A batch of fixed size, as captured graphs have it: rows past `query_start[batch]` are 0, their lse -inf."""
        problem = Problem(self.rank, self.world)
        with self.comm.plan(**problem.shape()) as plan:
            start = torch.tensor([0, 1, 1, 1], dtype=torch.int32)
            out, lse = plan.decode(problem.q, problem.own_k, problem.own_v, problem.length, query_start=start)
            close(out[:1], problem.truth[0][:1], 3e-6)
            expect(bool((out[1:] == 0).all() and (lse[1:] == EMPTY).all()), "padding rows")

    def dlpack(self) -> None:
        class Only:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.__dlpack__ = tensor.__dlpack__

        tensor = torch.arange(24, dtype=torch.bfloat16).view(2, 3, 4)[:, 1:]
        found, wanted = treeattn.view(Only(tensor)), treeattn.view(tensor)
        expect((found.data, found.shape, found.stride, found.dtype, found.bytes) ==
               (wanted.data, wanted.shape, wanted.stride, wanted.dtype, wanted.bytes), (found, wanted))  # fmt: skip

    def errors(self) -> None:
        problem = Problem(self.rank, self.world)
        with self.comm.plan(**problem.shape()) as plan:
            q, k, v, length = problem.q, problem.own_k, problem.own_v, problem.length
            plan.decode(q, k, v, length)
            # Tensors that differ from those of a step whose arguments are kept.
            refused(TypeError, "kv_length is int64", plan.decode, q, k, v, length.long())
            refused(TypeError, "not contiguous", plan.decode, q, k, v, length.repeat_interleave(2)[::2])
            refused(TypeError, "q is bfloat16", plan.decode, q.bfloat16(), k, v, length)
            refused(ValueError, "k is .3, 40, 4, 32.; wanted .any, any, 2, 64.", plan.decode, q, k.view(3, 40, 4, 32), v, length)
            refused(ValueError, "q is .3, 4, 64.", plan.decode, q[:, :4], k, v, length)
            refused(TypeError, "has no field lengths", plan.decode, q, k, v, length, lengths=length)
            refused(ValueError, "out is .3, 4, 64.", plan.decode_into, q, k, v, length, q[:, :4].clone(), torch.zeros(3, 4))
            o, lse = plan.partial(q, k, v, length)
            plan.merge(o, lse)
            refused(ValueError, "lse is .2, 8.", plan.merge, o, lse[:2])
            refused(ValueError, "lse is .3, 4.", plan.merge, o, lse[:, :4])
            refused(TypeError, "lse is float64", plan.merge, o, lse.double())
            with self.comm.plan(**problem.shape()) as other:
                number = other.id
            refused(ValueError, f"plan is {number}", torch.ops.treeattn.decode, q, k, v, length, number)
            # Rank 1 reads a length that is out of range: every rank is told of it, and which one it was.
            length = problem.length.clone()
            if self.rank == 1:
                length[0] = 1000
            out, lse = torch.zeros(3, HEADS, DIM), torch.zeros(3, HEADS)
            try:
                plan.decode_into(problem.q, problem.own_k, problem.own_v, length, out, lse)
                expect(False, "it was taken")
            except treeattn.InvalidDataError as error:
                expect((error.code, error.rank) == (treeattn.ERROR_INVALID_DATA, 1), (error, error.rank))
            expect(bool(out[0].isnan().all()) and not out[1:].isnan().any(), "NaN in its rows alone")
            close(plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)[0], problem.truth[0], 3e-6)

    def deadline(self) -> None:
        """A rank that does not come: the other one's step ends by its deadline, and gloo's operation is given up."""
        comm = treeattn.torch.Comm.from_process_group(step_timeout_ns=300_000_000, setup_timeout_ns=20_000_000_000)
        problem = Problem(self.rank, self.world)
        plan = comm.plan(**problem.shape())
        dist.barrier()
        if self.rank == 0:
            began = time.monotonic()
            try:
                plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)
                expect(False, "it ended well")
            except treeattn.TimeoutError:
                pass
            expect(time.monotonic() - began < 5, "the deadline was kept")
            expect(bool(comm.status()["broken"]), comm.status())
        dist.barrier()
        comm.close()

    def tree_over_sendrecv(self) -> None:
        comm = treeattn.torch.Comm.from_process_group(node_group=1 + self.rank // 2)
        for algorithm in ("tree", "ring"):
            problem = Problem(self.rank, self.world)
            with comm.plan(**problem.shape(algorithm=algorithm)) as plan:
                close(plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)[0], problem.truth[0], 3e-6)
        comm.close()

    def lost_rank(self) -> None:
        """The last rank is gone in the middle of things: the others are told, and their process goes on."""
        comm = treeattn.torch.Comm.from_process_group(step_timeout_ns=2_000_000_000)
        problem = Problem(self.rank, self.world)
        plan = comm.plan(**problem.shape())
        dist.barrier()
        if self.rank == self.world - 1:
            print("passed lost_rank", flush=True)
            os._exit(0)
        try:
            plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)
            expect(False, "it ended well")
        except (treeattn.TransportError, treeattn.TimeoutError) as error:
            expect(bool(comm.status()["broken"]), error)


def main() -> None:
    dist.init_process_group("gloo")
    run(Cases(), sys.argv[1:])


if __name__ == "__main__":
    main()
