"""A whole decoder on ranks that share a cache: greedy tokens after long prompts, by this library and by what it is compared with.

    torchrun --nproc-per-node 2 llama.py             # GPUs: the shape of Llama 3.1 8B; prompts of 32k to 256k tokens
    torchrun --nproc-per-node 2 llama.py --tiny      # also CPUs: a small shape, a prompt of 200 tokens, no figures that mean anything

transformers' Llama with random weights, the same on every rank. The cache is split along the sequence: each rank holds an equal
part of the prompt, whose keys and values are random, too, since decoding alone is measured; the last rank takes what is decoded.

    treeattn     every layer is a step of this library
    allreduce3   the same with the library's ALLREDUCE3, the paper's merge by three allreduces (arXiv 2408.04093)
    ring         torch alone: shards go around the ranks, each attends what comes (SDPA's flash attention) and merges by lse
    one          rank 0 alone with the whole cache, by torch; not timed: whose tokens are the right ones

On GPUs a token is a replayed graph (--eager: without). `attention` is the time of the layers' attention alone, in a graph of its
own, as a share of a token's.

Tokens have to be the same. Where two logits are almost alike, rounding to bf16 decides which is the larger, and what follows is
another text: tokens may differ from one on whose two largest logits are nearer than --tie standard deviations of all. The run ends
with 1 where others differ.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import treeattn.torch

ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "max_position_embeddings": 524288, "rope_theta": 500000.0, "rope_scaling": ROPE}  # fmt: skip
TINY = LLAMA_8B | {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
                   "num_key_value_heads": 2}  # fmt: skip


class Shard:
    """A rank's part of every layer's cache, [1, slot, kv head, dim], with room for what is decoded, and where the next token goes."""

    def __init__(self, config: LlamaConfig, prompt: int, tokens: int, rank: int, world: int, like: torch.Tensor) -> None:
        cuts = [prompt * r // world for r in range(world + 1)]
        self.prompt, self.held, self.grows = prompt, cuts[rank + 1] - cuts[rank], rank == world - 1
        # The same on every rank, as shards that are passed around have to be; the last slot takes what is not this rank's to hold.
        self.room = max(b - a for a, b in zip(cuts, cuts[1:])) + tokens + 1
        heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        make = torch.Generator(device=like.device)
        self.k, self.v = [], []
        for layer in range(config.num_hidden_layers):
            for held, seed in ((self.k, 2 * layer), (self.v, 2 * layer + 1)):
                make.manual_seed(seed)
                whole = torch.randn(prompt, heads, dim, generator=make, dtype=like.dtype, device=like.device)
                mine = torch.zeros(1, self.room, heads, dim, dtype=like.dtype, device=like.device)
                mine[0, : self.held] = whole[cuts[rank] : cuts[rank + 1]]
                held.append(mine)
        self.length = torch.zeros(1, dtype=torch.int32, device=like.device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=like.device)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=like.device)
        # By how many standard deviations of all logits the largest exceeds the next.
        self.lead = torch.zeros((), device=like.device)
        self.reset()

    def reset(self) -> None:
        """Back to the prompt, behind which token 7 comes."""
        self.length.fill_(self.held + self.grows)
        self.slot.fill_(self.held if self.grows else self.room - 1)
        self.position.fill_(self.prompt)
        self.token.fill_(7)

    def advance(self) -> None:
        self.length += int(self.grows)
        self.slot += int(self.grows)
        self.position += 1


class Library:
    """Attention over all shards, by this library."""

    fixed_lengths = False  # it reads them on the device, so that one graph serves every token

    def __init__(self, comm: treeattn.torch.Comm, config: LlamaConfig, shard: Shard, algorithm: str) -> None:
        dtype = str(shard.k[0].dtype).rpartition(".")[2]
        self.shard = shard
        self.plan = comm.plan(q_heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, dtype=dtype, max_batch=1,
                              head_dim_qk=shard.k[0].shape[-1], max_query_tokens=1, max_kv_length=shard.room, algorithm=algorithm)  # fmt: skip

    def attend(self, layer: int, q: torch.Tensor, decoded: int) -> torch.Tensor:
        return self.plan.decode(q, self.shard.k[layer], self.shard.v[layer], self.shard.length)[0]

    def close(self) -> None:
        self.plan.close()


def partial(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's flash attention of q [1, head, dim] over k and v [1, slot, kv head, dim]: out [kv head, group, dim], lse [kv head, group]."""
    kv_heads = k.shape[2]
    rows = q.view(1, kv_heads, -1, q.shape[-1])  # heads that share keys are rows of one head
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(rows, keys, values)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, keys, values)
    return out[0].float(), lse[0, :, : rows.shape[2]].float()


class Ring:
    """Attention over all shards by torch: they go around, and every rank attends each as it comes."""

    fixed_lengths = True

    def __init__(self, shard: Shard, rank: int, world: int, group: object) -> None:
        self.shard, self.rank, self.world, self.group = shard, rank, world, group
        self.buffers = [[torch.empty_like(shard.k[0]), torch.empty_like(shard.v[0])] for _ in range(2)]
        cuts = [shard.prompt * r // world for r in range(world + 1)]
        self.lengths = [b - a for a, b in zip(cuts, cuts[1:])]

    def attend(self, layer: int, q: torch.Tensor, decoded: int) -> torch.Tensor:
        current, partials = [self.shard.k[layer], self.shard.v[layer]], []
        for hop in range(self.world):
            owner = (self.rank - hop) % self.world
            works = []
            if hop + 1 < self.world:
                following = self.buffers[hop % 2]
                to, source = (self.rank + 1) % self.world, (self.rank - 1) % self.world
                ops = [dist.P2POp(dist.isend, x, to, self.group) for x in current]
                ops += [dist.P2POp(dist.irecv, x, source, self.group) for x in following]
                works = dist.batch_isend_irecv(ops)
            length = self.lengths[owner] + (decoded if owner == self.world - 1 else 0)
            partials.append(partial(q, current[0][:, :length], current[1][:, :length]))
            for work in works:
                work.wait()
            if works:
                current = following
        # In the order of ranks, so that all hold the same bits.
        partials = [partials[(self.rank - owner) % self.world] for owner in range(self.world)]
        lse = torch.stack([lse for _, lse in partials])
        weights = (lse - lse.logsumexp(0)).exp()
        return (torch.stack([out for out, _ in partials]) * weights[..., None]).sum(0).view(q.shape).to(q.dtype)

    def close(self) -> None:
        self.buffers = []


class One:
    """Attention over a whole cache, by torch."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def attend(self, layer: int, q: torch.Tensor, decoded: int) -> torch.Tensor:
        length = self.shard.prompt + decoded
        return partial(q, self.shard.k[layer][:, :length], self.shard.v[layer][:, :length])[0].view(q.shape).to(q.dtype)


@torch.inference_mode()
def decode(model: LlamaForCausalLM, shard: Shard, engine: Library | Ring | One, decoded: int) -> None:
    """Decodes a token, the `decoded`-th, and makes it the next one's input. Nothing here waits for the GPU."""
    body, at = model.model, shard.slot
    hidden = body.embed_tokens(shard.token)
    cos, sin = body.rotary_emb(hidden, shard.position)
    for number, layer in enumerate(body.layers):
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (project(x).view(1, 1, -1, attention.head_dim).transpose(1, 2) for project in
                   (attention.q_proj, attention.k_proj, attention.v_proj))  # fmt: skip
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        shard.k[number].index_copy_(1, at, k.transpose(1, 2))
        shard.v[number].index_copy_(1, at, v.transpose(1, 2))
        out = engine.attend(number, q[0].transpose(0, 1).contiguous(), decoded)
        hidden = hidden + attention.o_proj(out.reshape(1, 1, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits = model.lm_head(body.norm(hidden)).float()
    largest = logits.topk(2)
    shard.token.copy_(largest.indices[..., 0])
    shard.lead.copy_((largest.values[0, 0, 0] - largest.values[0, 0, 1]) / logits.std())
    shard.advance()


@torch.inference_mode()
def attention_alone(shard: Shard, engine: Library | Ring, q: torch.Tensor, decoded: int) -> None:
    """What all layers of a token attend."""
    for layer in range(len(shard.k)):
        engine.attend(layer, q, decoded)


def replayed(call: Callable[[int], None], tokens: int, fixed_lengths: bool) -> Callable[[int], None]:
    """Graphs of `call(decoded)`: one, or one a token where lengths are part of it."""
    graphs = []
    for decoded in range(1, tokens + 1) if fixed_lengths else (1,):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call(decoded)
        graphs.append(graph)
    return lambda decoded: graphs[min(decoded, len(graphs)) - 1].replay()


def timed(call: Callable[[int], None], tokens: int, reset: Callable[[], None], repeats: int, synchronize: Callable[[], None]) -> float:
    """The median of the seconds that calls for all tokens take, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        reset()
        synchronize()
        dist.barrier()
        begin = time.perf_counter()
        for decoded in range(1, tokens + 1):
            call(decoded)
        synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def greedy(call: Callable[[int], None], shard: Shard, tokens: int) -> list[tuple[int, float]]:
    """The tokens that `call` decodes, and how far their logits lead."""
    shard.reset()
    found = []
    for decoded in range(1, tokens + 1):
        call(decoded)
        found.append((int(shard.token), float(shard.lead)))
    return found


def compare(found: dict[str, list[tuple[int, float]]], tie: float) -> tuple[bool, str]:
    """Whether the engines' tokens are those of the last one but for ties, and what to say of it."""
    right = found[list(found)[-1]]
    same, said = True, []
    for name, decoded in list(found.items())[:-1]:
        differs = next((i for i, (a, b) in enumerate(zip(decoded, right)) if a[0] != b[0]), None)
        if differs is None:
            said.append(f"{name} all {len(right)}")
            continue
        lead = max(decoded[differs][1], right[differs][1])
        same &= lead < tie
        said.append(f"{name} {differs} of {len(right)}, then logits {lead:.4f} standard deviations apart")
    return same, f"the same tokens as {list(found)[-1]}: {'; '.join(said)}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small shape; f32 on CPUs")
    parser.add_argument("--prompts", type=int, nargs="+", help="tokens of the prompts")
    parser.add_argument("--tokens", type=int, default=10, help="tokens to decode")
    parser.add_argument("--engines", nargs="+", default=["treeattn", "allreduce3", "ring", "one"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tie", type=float, default=0.15, help="standard deviations within which logits are alike; a step of bf16 is 0.024 of them")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    found = parser.parse_args()
    found.prompts = found.prompts or ([200] if found.tiny else [32768, 65536, 131072, 262144])
    return found


def main() -> int:
    args = arguments()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
    torch.manual_seed(1)
    config = LlamaConfig(**TINY if args.tiny else LLAMA_8B)
    with device:
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    comm = treeattn.torch.Comm.from_process_group()
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    say(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}e9 weights, {config.num_hidden_layers} layers, {world} ranks, {device}, "
        f"torch {torch.__version__}, treeattn {treeattn.version()}")  # fmt: skip
    say(f"{'prompt':>8} {'engine':>10} {f's, {args.tokens} tokens':>12} {'ms a token':>10} {'attention':>9}")
    same = True
    for prompt in args.prompts:
        found, times = {}, {}
        for name in args.engines:
            # Rank 0 has the whole cache; the others wait.
            alone = name == "one"
            if alone and rank > 0:
                dist.barrier()
                continue
            shard = Shard(config, prompt, args.tokens, *((0, 1) if alone else (rank, world)), model.lm_head.weight)
            if alone:
                engine = One(shard)
                found[name] = greedy(lambda decoded: decode(model, shard, engine, decoded), shard, args.tokens)
                del shard, engine
                dist.barrier()
                continue
            algorithm = "auto" if name == "treeattn" else name
            engine = Ring(shard, rank, world, dist.group.WORLD) if name == "ring" else Library(comm, config, shard, algorithm)
            q = torch.randn(1, config.num_attention_heads, shard.k[0].shape[-1], device=device)
            token = lambda decoded: decode(model, shard, engine, decoded)  # noqa: E731
            layers = lambda decoded: attention_alone(shard, engine, q, decoded)  # noqa: E731
            token(1), layers(1)
            if on_gpu and not args.eager:
                synchronize()
                dist.barrier()
                token, layers = (replayed(call, args.tokens, engine.fixed_lengths) for call in (token, layers))
            found[name] = greedy(token, shard, args.tokens)
            whole = timed(token, args.tokens, shard.reset, args.repeats, synchronize)
            part = timed(layers, args.tokens, shard.reset, args.repeats, synchronize)
            say(f"{prompt:8} {name:>10} {whole:12.4f} {whole / args.tokens * 1e3:10.2f} {part / whole:9.0%}")
            times[name] = whole
            engine.close()
            # Graphs hold the shard's memory.
            del token, layers, engine, shard
            if on_gpu:
                torch.cuda.empty_cache()
        if "ring" in times:
            say("; ".join(f"ring takes {times['ring'] / whole:.2f} times as long as {name}" for name, whole in times.items() if name != "ring"))
        for name, decoded in found.items():
            print(f"rank {rank}, prompt {prompt}, tokens by {name}: {' '.join(str(token) for token, _ in decoded)}", flush=True)
        alike, said = compare(found, args.tie)
        same &= alike
        print(f"rank {rank}, prompt {prompt}, {said}", flush=True)
    every = torch.tensor([int(same)], device=device)
    dist.all_reduce(every, dist.ReduceOp.MIN)
    comm.close()
    dist.destroy_process_group()
    return 0 if every.item() else 1


if __name__ == "__main__":
    sys.exit(main())
