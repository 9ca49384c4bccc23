"""One rank of test_torch_gpus.py, a process a GPU: runs the cases that it is told, all ranks the same ones in the same order."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import treeattn
import treeattn.torch
from checks import close, expect, run

HEADS, KV_HEADS, DIM, BATCH, CAPACITY = 32, 8, 128, 4, 4096
BOUND = 1e-2  # of SDPA, whose weights are bf16


class Problem:
    """Sequences whose keys lie on the ranks in equal parts. `length` may be written before each step."""

    def __init__(self, rank: int, world: int, seed: int = 0) -> None:
        self.rank, self.world = rank, world
        make = torch.Generator("cuda").manual_seed(seed)
        self.q = torch.randn(BATCH, HEADS, DIM, generator=make, device="cuda", dtype=torch.bfloat16)
        shape = (BATCH, world, CAPACITY, KV_HEADS, DIM)
        self.k, self.v = (torch.randn(shape, generator=make, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.own_k, self.own_v = self.k[:, rank].contiguous(), self.v[:, rank].contiguous()
        self.length = torch.zeros(BATCH, dtype=torch.int32, device="cuda")

    @staticmethod
    def shape(**more: object) -> dict:
        return {"q_heads": HEADS, "kv_heads": KV_HEADS, "head_dim_qk": DIM, "dtype": "bfloat16", "max_batch": BATCH,
                "max_query_tokens": BATCH, "max_kv_length": CAPACITY} | more  # fmt: skip

    def hold(self, *lengths: int) -> None:
        """Every rank holds so many keys of each sequence."""
        self.length.copy_(torch.tensor(lengths, dtype=torch.int32))

    def truth(self) -> torch.Tensor:
        """By SDPA, over all ranks' keys."""
        outs = []
        for b, held in enumerate(self.length.tolist()):
            k, v = (x[b, :, :held].reshape(1, -1, KV_HEADS, DIM).transpose(1, 2) for x in (self.k, self.v))
            outs.append(torch.nn.functional.scaled_dot_product_attention(self.q[b, None, :, None], k, v, enable_gqa=True)[:, :, 0])
        return torch.cat(outs)


class Cases:
    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    @functools.cached_property
    def comm(self) -> treeattn.torch.Comm:
        return treeattn.torch.Comm.from_process_group()

    def problem(self, seed: int = 0) -> Problem:
        return Problem(self.rank, self.world, seed)

    def eager(self) -> None:
        problem = self.problem()
        for output in ("replicated", "scattered"):
            first, count = treeattn.head_range(HEADS, self.world, self.rank) if output == "scattered" else (0, HEADS)
            with self.comm.plan(**problem.shape(output=output)) as plan:
                for lengths in ((1, 7, 500, 4096), (4096, 4096, 4096, 4096), (64, 65, 1, 1)):
                    problem.hold(*lengths)
                    out, _ = plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)
                    close(out, problem.truth()[:, first : first + count], BOUND)

    def partial_and_merge(self) -> None:
        problem = self.problem()
        problem.hold(100, 1, 2048, 4096)
        with self.comm.plan(**problem.shape()) as plan:
            out, lse = plan.merge(*plan.partial(problem.q, problem.own_k, problem.own_v, problem.length))
            close(out, problem.truth(), BOUND)
            close(lse, plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)[1], 1e-4)

    def replayed(self) -> None:
        """One graph of two layers, replayed with other lengths, queries and keys."""
        problem = self.problem()
        problem.hold(9, 9, 9, 9)
        with self.comm.plan(**problem.shape()) as plan:
            step = lambda: plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)[0]  # noqa: E731
            step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outs = [step(), step()]
            for lengths in ((1, 7, 500, 4096), (4096, 3, 2, 1), (777, 778, 779, 780)):
                problem.hold(*lengths)
                problem.q.neg_()
                graph.replay()
                expect(torch.equal(*outs), "two layers that are alike differ")
                close(outs[0], problem.truth(), BOUND)

    def two_streams(self) -> None:
        """Two halves of a batch, each on a stream and a communicator of its own, a hundred steps side by side."""
        others = treeattn.torch.Comm.from_process_group()
        halves = [(comm, self.problem(seed), torch.cuda.Stream()) for seed, comm in enumerate((self.comm, others))]
        plans = [comm.plan(**problem.shape()) for comm, problem, _ in halves]
        outs: list[list[torch.Tensor]] = [[], []]
        halves[0][1].hold(4096, 4000, 3000, 2000), halves[1][1].hold(1, 2, 3, 4)
        torch.cuda.synchronize()
        for _ in range(100):
            for half, (_, problem, stream) in enumerate(halves):
                with torch.cuda.stream(stream):
                    outs[half].append(plans[half].decode(problem.q, problem.own_k, problem.own_v, problem.length)[0])
        torch.cuda.synchronize()
        for half, (_, problem, _) in enumerate(halves):
            close(outs[half][0], problem.truth(), BOUND)
            expect(all(torch.equal(out, outs[half][0]) for out in outs[half]), "the same step twice differs")
        for plan in plans:
            plan.close()
        others.close()

    def beside_nccl(self) -> None:
        """Allreduces of the engine's own communicator run on another stream meanwhile."""
        problem, side = self.problem(), torch.cuda.Stream()
        problem.hold(4096, 100, 1, 4096)
        with self.comm.plan(**problem.shape()) as plan:
            truth, total = problem.truth(), torch.ones(1 << 22, device="cuda")
            torch.cuda.synchronize()
            for _ in range(50):
                with torch.cuda.stream(side):
                    dist.all_reduce(total)
                    total /= self.world
                out, _ = plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)
            torch.cuda.synchronize()
            close(out, truth, BOUND)
            expect(bool((total == 1).all()), "the allreduces")

    def wrapped(self) -> None:
        """Torch's own NCCL communicator, wrapped: steps beside its allreduces on another stream."""
        total = torch.ones(1 << 20, device="cuda")
        dist.all_reduce(total)
        torch.cuda.synchronize()
        address = dist.group.WORLD._get_backend(torch.device("cuda"))._comm_ptr()
        comm, problem, side = treeattn.torch.Comm.wrap_nccl(address, treeattn.cuda(self.rank)), self.problem(), torch.cuda.Stream()
        expect((comm.rank, comm.world) == (self.rank, self.world), comm.describe())
        problem.hold(4096, 1, 77, 2000)
        for algorithm in ("auto", "allreduce3"):
            with comm.plan(**problem.shape(algorithm=algorithm)) as plan:
                truth = problem.truth()
                torch.cuda.synchronize()
                for _ in range(20):
                    with torch.cuda.stream(side):
                        dist.all_reduce(total)
                        total /= self.world
                    out, _ = plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)
                torch.cuda.synchronize()
                close(out, truth, BOUND)
        expect(bool((total == self.world).all()), "the allreduces")
        comm.close()

    def killed(self) -> None:
        """The last rank is killed among replays of a graph: the others' steps end by their deadline, and their GPU goes on."""
        problem = self.problem()
        comm = treeattn.torch.Comm.from_process_group(step_timeout_ns=500_000_000)
        plan = comm.plan(**problem.shape())
        problem.hold(4096, 4096, 4096, 4096)
        plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outs = [plan.decode(problem.q, problem.own_k, problem.own_v, problem.length)[0] for _ in range(8)]
        dist.barrier()
        if self.rank == self.world - 1:
            print("passed killed", flush=True)
            for _ in range(100):
                graph.replay()
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        for _ in range(3000):
            graph.replay()
        torch.cuda.synchronize()
        expect(time.monotonic() - began < 20, "the deadline was kept")
        expect(bool(outs[-1].isnan().all()), "NaN in what was not merged")
        expect(bool(comm.status()["broken"]), comm.status())
        close(torch.ones(3, device="cuda").sum(), torch.tensor(3.0, device="cuda"), 0)


def main() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    run(Cases(), sys.argv[1:])


if __name__ == "__main__":
    main()
