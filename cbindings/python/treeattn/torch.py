"""The library in torch: communicators of process groups, and the ops treeattn::decode, treeattn::partial, treeattn::merge.

    comm = treeattn.torch.Comm.from_process_group()            # collective; the default group
    plan = comm.plan(q_heads=32, kv_heads=8, head_dim_qk=128, dtype="bfloat16", max_batch=8, max_query_tokens=8,
                     max_kv_length=65536)                      # collective; once a shape
    out, lse = plan.decode(q, k, v, kv_length)                 # collective; once a layer and token

Tensors are as in `treeattn_decode_args_t`: q [token, head, dim], k and v [sequence, token, kv head, dim] or pages, each rank's own;
index tensors int32, contiguous, on the plan's device. On CPUs a step runs on the calling thread; on GPUs it is enqueued on
torch's current stream, and can be captured. The ops are opaque to `torch.compile` and have no gradient.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections import Counter
from datetime import timedelta
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

import treeattn
from treeattn import _abi, _c
from treeattn._arguments import merge_arguments
from treeattn._gloo import Gloo

_DTYPES = {_abi.DTYPE_F32: torch.float32, _abi.DTYPE_F16: torch.float16, _abi.DTYPE_BF16: torch.bfloat16}
_SECOND = 1_000_000_000


_named: Counter[str] = Counter()


class Comm(treeattn.Comm):
    """A communicator whose plans take torch's tensors."""

    _gloo: Gloo | None = None

    @classmethod
    def from_process_group(
        cls,
        pg: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
        runtime: treeattn.Runtime | None = None,
        **config: Any,
    ) -> Comm:
        """This rank's end of a communicator with the ranks of a process group. Collective over the group.

        On GPUs rank 0 names an NCCL communicator of the library's own, and the group's store brings the name to the others. On
        CPUs the ranks exchange over a gloo group of the library's own. The given group is not used by steps.

        @param pg     None: the default group.
        @param device where this rank's tensors live. None: the current GPU where the group has NCCL, else the CPU.
        @param config fields of `treeattn_comm_config_t`.
        """
        pg = pg or dist.group.WORLD
        if device is None:
            device = "cuda" if "nccl" in dist.get_backend_config(pg) else "cpu"
        device = torch.device(device)
        if device.type == "cuda":
            return cls._over_nccl(pg, device, runtime, config)
        if device.type != "cpu":
            raise ValueError(f"device is {device}; wanted a CPU or a CUDA device")
        seconds = max(config.get("setup_timeout_ns", 0) or 30 * _SECOND, config.get("step_timeout_ns", 0) or 10 * _SECOND) / _SECOND
        ranks = dist.get_process_group_ranks(pg)
        group = dist.new_group(ranks, timedelta(seconds=seconds + 1), "gloo", use_local_synchronization=True)
        gloo = Gloo(group)
        try:
            comm = cls.from_transport(
                gloo.allgather, gloo.world, group.rank(), sendrecv=gloo.sendrecv, device=treeattn.cpu(), runtime=runtime, **config
            )
        except treeattn.Error:
            gloo.close()
            raise
        comm._gloo = gloo
        return comm

    @classmethod
    def _over_nccl(cls, pg: Any, device: torch.device, runtime: Any, config: dict[str, Any]) -> Comm:
        index = device.index if device.index is not None else torch.cuda.current_device()
        torch.cuda.init()  # torch's own NCCL and context come first, and are then shared
        store = dist.distributed_c10d._get_process_group_store(pg)
        # The same number on every rank, since making communicators of a group is collective.
        key = f"treeattn/{pg.group_name}/{_named[pg.group_name]}"
        _named[pg.group_name] += 1
        if dist.get_rank(pg) == 0:
            store.set(key, cls.nccl_unique_id(runtime).hex())
        store.wait([key], timedelta(seconds=(config.get("setup_timeout_ns", 0) or 30 * _SECOND) / _SECOND))
        unique_id = bytes.fromhex(store.get(key).decode())
        return cls.from_nccl(unique_id, dist.get_world_size(pg), dist.get_rank(pg), treeattn.cuda(index), runtime=runtime, **config)

    def _made(self, handle: int, shape: _abi.AttentionDesc) -> Plan:
        return Plan(handle, self, shape)

    def close(self) -> None:
        """Leaves the communicator, as do its plans' ops."""
        super().close()
        gloo, self._gloo = self._gloo, None
        if gloo is not None:
            gloo.close()


_plans: WeakValueDictionary[int, Plan] = WeakValueDictionary()
_ids = itertools.count(1)


class _Step:
    """The arguments of a step for tensors of certain shapes: what changes from call to call are addresses alone."""

    __slots__ = ("args", "ref", "words", "places", "function")

    def __init__(self, args: ctypes.Structure, names: list[str], function: Any) -> None:
        self.args, self.ref, self.function = args, ctypes.byref(args), function
        self.words = (ctypes.c_uint64 * (ctypes.sizeof(args) // 8)).from_buffer(args)
        kinds = type(args)
        self.places = [getattr(kinds, name).offset // 8 for name in names]  # `data` is the first field of a tensor


class Plan(treeattn.Plan):
    """A plan whose steps take and give torch's tensors. Its ops name it by `id`."""

    MOST_SHAPES = 1024  # whose arguments are kept

    def __init__(self, handle: int, comm: Comm, desc: _abi.AttentionDesc) -> None:
        super().__init__(handle, comm, desc)
        self.id = next(_ids)
        _plans[self.id] = self
        self.out_dtype = _DTYPES[desc.out_dtype]
        self.on_gpu = comm.device >= treeattn.cuda()
        self.place = torch.device("cuda", comm.device - treeattn.cuda()) if self.on_gpu else torch.device("cpu")
        self._handle = ctypes.c_void_p(handle)
        self._steps: dict[Any, _Step] = {}
        self._like: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._room: list[torch.Tensor] = []
        self._streams: dict[int, tuple[treeattn.Stream, ctypes.c_void_p]] = {}

    def close(self) -> None:
        _plans.pop(self.id, None)
        super().close()

    def decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_length: torch.Tensor, **fields: torch.Tensor) -> Any:
        """(out, lse) over all ranks' keys. Collective. The op treeattn::decode where something records or replaces ops.

        @param fields tensors of `treeattn_decode_args_t` by name (`global_length`, `kv_start`, `query_start`, `block_table`, ...).
        """
        more = _listed(fields) if fields else _NONE
        if _traced(q):
            return torch.ops.treeattn.decode(q, k, v, kv_length, self.id, *more)
        return self._decode(q, k, v, kv_length, *more)

    def decode_into(self, q: Any, k: Any, v: Any, kv_length: Any, out: torch.Tensor, lse: torch.Tensor, **fields: Any) -> None:
        """As `decode`, into tensors of the caller's; the op treeattn::decode_into."""
        more = _listed(fields) if fields else _NONE
        if _traced(q):
            torch.ops.treeattn.decode_into(q, k, v, kv_length, self.id, out, lse, *more)
        else:
            self._attend("decode", q, k, v, kv_length, out, lse, False, *more)

    def partial(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_length: torch.Tensor, **fields: torch.Tensor) -> Any:
        """(out, lse) over this rank's keys, all heads. No exchange. The op treeattn::partial, as `decode`."""
        more = _listed(fields) if fields else _NONE
        if _traced(q):
            return torch.ops.treeattn.partial(q, k, v, kv_length, self.id, *more)
        return self._partial(q, k, v, kv_length, *more)

    def merge(self, o: torch.Tensor, lse: torch.Tensor, *, lse_base: int = 0, out_lse_base: int = 0, flags: int = 0,
              **fields: torch.Tensor) -> Any:  # fmt: skip
        """(out, lse) of all ranks' partials, o [token, head, dim] and lse [token, head]. Collective. The op treeattn::merge.

        @param lse_base 2: the incoming lse is to base 2; `out_lse_base` of the outgoing one.
        @param flags    `treeattn.MERGE_...`
        @param fields   tensors of `treeattn_merge_args_t` by name: `sum`, `query_start`, `kv_length`.
        """
        more = _listed(fields) if fields else _NONE
        if _traced(o):
            return torch.ops.treeattn.merge(o, lse, self.id, *more, lse_base=lse_base, out_lse_base=out_lse_base, flags=flags)
        return self._merge(o, lse, lse_base, out_lse_base, flags, *more)

    def _shapes(self, tokens: int, heads: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of the output and of the lse."""
        return [((tokens, heads, self.desc.head_dim_v), self.out_dtype), ((tokens, heads), torch.float32)]

    def _outputs(self, tokens: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._like.get((tokens, heads))
        if found is None:
            if tokens > self.desc.max_query_tokens:
                raise ValueError(f"query_tokens: found {tokens}, wanted at most the plan's max_query_tokens = {self.desc.max_query_tokens}")
            # Views of one tensor each: to be made alike from is faster than from a shape, and takes no memory for every number of tokens.
            if not self._like:
                most = self._shapes(self.desc.max_query_tokens, self.desc.q_heads)
                with torch.inference_mode(False):
                    self._room = [torch.empty(math.prod(shape), dtype=dtype, device=self.place) for shape, dtype in most]
            shapes = [shape for shape, _ in self._shapes(tokens, heads)]
            found = self._like[tokens, heads] = [room[: math.prod(s)].view(s) for room, s in zip(self._room, shapes)]
        return torch.empty_like(found[0]), torch.empty_like(found[1])

    def _stream(self) -> ctypes.c_void_p:
        """The library's stream of torch's current one, on a GPU. On a CPU steps run on the calling thread."""
        current = _current_stream(self.place.index)
        found = self._streams.get(current)
        if found is None:
            made = treeattn.Stream(self.comm.device, cuda_stream=current, runtime=self.comm.runtime)
            found = self._streams[current] = (made, ctypes.c_void_p(made.handle))
        return found[1]

    def _here(self, *tensors: torch.Tensor) -> None:
        """@raises ValueError: a tensor is on another kind of device. (Which GPU an address is of the library sees itself.)"""
        for tensor in tensors:
            if tensor.is_cpu == self.on_gpu:
                raise ValueError(f"a tensor is on {tensor.device}; wanted all on the plan's device, {self.place}")

    def _keep(self, key: Any, step: _Step) -> _Step:
        if len(self._steps) >= self.MOST_SHAPES:
            self._steps.clear()
        self._steps[key] = step
        return step

    def _attend(self, call: str, q: Any, k: Any, v: Any, kv_length: Any, out: Any, lse: Any, own: bool, fields: Any, names: str) -> None:
        """A step of `call`. `own`: the outputs are those of `_outputs`, whose shape the other tensors' say."""
        # Equal keys stand for equal structs but for addresses, so that all that is checked of a tensor has to be in them.
        key = (call, q.shape, q.stride(), q.dtype, q.is_cpu, k.shape, k.stride(), k.dtype, k.is_cpu, v.shape, v.stride(), v.dtype,
               v.is_cpu, kv_length.shape, kv_length.stride(), kv_length.dtype, kv_length.is_cpu)  # fmt: skip
        if not own:
            key += (out.shape, out.stride(), out.dtype, out.is_cpu, lse.shape, lse.stride(), lse.dtype, lse.is_cpu)
        if fields:
            key += (names, *((tensor.shape, tensor.stride(), tensor.dtype, tensor.is_cpu) for tensor in fields))
        step = self._steps.get(key)
        if step is None:
            words = names.split()
            more = dict(zip(words, fields or (), strict=True))
            self._here(q, k, v, kv_length, out, lse, *more.values())
            args = self.arguments(q, k, v, out, lse, kv_length=kv_length, whole=call == "partial", **more)
            step = self._keep(key, _Step(args, ["q", "k", "v", "out", "lse", "kv_length", *words], _FUNCTIONS[call]))
        words = step.words
        if fields:
            a, b, c, d, e, f, *rest = step.places
            for place, tensor in zip(rest, fields):
                words[place] = tensor.data_ptr()
        else:
            a, b, c, d, e, f = step.places
        words[a], words[b], words[c] = q.data_ptr(), k.data_ptr(), v.data_ptr()
        words[d], words[e], words[f] = out.data_ptr(), lse.data_ptr(), kv_length.data_ptr()
        status = step.function(self._handle, step.ref, self._stream() if self.on_gpu else None)
        if status:
            raise self.comm.failure(status)

    def _decode(self, q: Any, k: Any, v: Any, kv_length: Any, fields: Any, names: str) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self._outputs(q.shape[0], self.heads)
        self._attend("decode", q, k, v, kv_length, out, lse, True, fields, names)
        return out, lse

    def _partial(self, q: Any, k: Any, v: Any, kv_length: Any, fields: Any, names: str) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self._outputs(q.shape[0], self.desc.q_heads)
        self._attend("partial", q, k, v, kv_length, out, lse, True, fields, names)
        return out, lse

    def _merge(self, o: Any, lse: Any, lse_base: int, out_lse_base: int, flags: int, fields: Any, names: str) -> tuple[Any, Any]:
        out, out_lse = self._outputs(o.shape[0], self.heads)
        key = (o.shape, o.stride(), o.dtype, o.is_cpu, lse.shape, lse.stride(), lse.dtype, lse.is_cpu, lse_base, out_lse_base,
               flags)  # fmt: skip
        if fields:
            key += (names, *((tensor.shape, tensor.stride(), tensor.dtype, tensor.is_cpu) for tensor in fields))
        step = self._steps.get(key)
        if step is None:
            words = names.split()
            more = dict(zip(words, fields or (), strict=True))
            self._here(o, lse, *more.values())
            args = merge_arguments(o, lse, out, out_lse, lse_base=lse_base, out_lse_base=out_lse_base, flags=flags, **more)
            step = self._keep(key, _Step(args, ["o", "lse", "out", "out_lse", *words], _FUNCTIONS["merge"]))
        words, (a, b, c, d, *rest) = step.words, step.places
        words[a], words[b], words[c], words[d] = o.data_ptr(), lse.data_ptr(), out.data_ptr(), out_lse.data_ptr()
        for place, tensor in zip(rest, fields or ()):
            words[place] = tensor.data_ptr()
        status = step.function(self._handle, step.ref, self._stream() if self.on_gpu else None)
        if status:
            raise self.comm.failure(status)
        return out, out_lse


def _function(name: str) -> Any:
    """A function whose arguments ctypes passes as they are: without `argtypes` it converts nothing."""
    found = _c.lib[f"treeattn_plan_{name}"]
    found.restype = ctypes.c_int32
    return found


_FUNCTIONS = {name: _function(name) for name in ("decode", "partial", "merge")}


def _current_stream(index: int) -> int:
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw(index) if raw else torch.cuda.current_stream(index).cuda_stream


def _listed(fields: dict[str, Any]) -> tuple[list[torch.Tensor], str]:
    """Fields as the ops take them: a list and the names. Parameters of their own would cost 1.3 us a call where none is given."""
    given = {name: tensor for name, tensor in fields.items() if tensor is not None}
    return list(given.values()), " ".join(given)


_NONE: tuple[None, str] = (None, "")
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def _traced(tensor: torch.Tensor) -> bool:
    """Whether the op has to be called by torch. Else its work is done at once, which saves the 4 us that torch's way to it takes."""
    return torch.compiler.is_compiling() or type(tensor) is not torch.Tensor or _dispatch_modes() > 0


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor kv_length, int plan"
_FIELDS = "Tensor[]? fields=None, str names=''"
_library = torch.library.Library("treeattn", "DEF")
_library.define(f"decode({_INPUTS}, {_FIELDS}) -> (Tensor, Tensor)")
_library.define(f"partial({_INPUTS}, {_FIELDS}) -> (Tensor, Tensor)")
_library.define(f"decode_into({_INPUTS}, Tensor(a!) out, Tensor(b!) lse, {_FIELDS}) -> ()")
_BASES = "int lse_base=0, int out_lse_base=0, int flags=0"
_library.define(f"merge(Tensor o, Tensor lse, int plan, {_FIELDS}, *, {_BASES}) -> (Tensor, Tensor)")


def _plan(number: int) -> Plan:
    found = _plans.get(int(number))
    if found is None:
        raise ValueError(f"plan is {number}; wanted the id of a plan that has not been closed")
    return found


def _decode(q: Any, k: Any, v: Any, kv_length: Any, plan: int, fields: Any = None, names: str = "") -> Any:
    return _plan(plan)._decode(q, k, v, kv_length, fields, names)


def _decode_into(q: Any, k: Any, v: Any, kv_length: Any, plan: int, out: Any, lse: Any, fields: Any = None, names: str = "") -> None:
    _plan(plan)._attend("decode", q, k, v, kv_length, out, lse, False, fields, names)


def _partial(q: Any, k: Any, v: Any, kv_length: Any, plan: int, fields: Any = None, names: str = "") -> Any:
    return _plan(plan)._partial(q, k, v, kv_length, fields, names)


def _merge(o: Any, lse: Any, plan: int, fields: Any = None, names: str = "", *, lse_base: int = 0, out_lse_base: int = 0,
           flags: int = 0) -> Any:  # fmt: skip
    return _plan(plan)._merge(o, lse, lse_base, out_lse_base, flags, fields, names)


for _key in ("CPU", "CUDA"):
    for _name, _call in (("decode", _decode), ("decode_into", _decode_into), ("partial", _partial), ("merge", _merge)):
        _library.impl(_name, _call, _key)


def _fake_outputs(rows: torch.Tensor, plan: Plan, heads: int) -> tuple[torch.Tensor, ...]:
    return tuple(rows.new_empty(shape, dtype=dtype) for shape, dtype in plan._shapes(rows.shape[0], heads))


@torch.library.register_fake("treeattn::decode", lib=_library)
def _(q: Any, k: Any, v: Any, kv_length: Any, plan: int, fields: Any = None, names: str = "") -> Any:
    return _fake_outputs(q, _plan(plan), _plan(plan).heads)


@torch.library.register_fake("treeattn::decode_into", lib=_library)
def _(q: Any, k: Any, v: Any, kv_length: Any, plan: int, out: Any, lse: Any, fields: Any = None, names: str = "") -> None:
    return None


@torch.library.register_fake("treeattn::partial", lib=_library)
def _(q: Any, k: Any, v: Any, kv_length: Any, plan: int, fields: Any = None, names: str = "") -> Any:
    return _fake_outputs(q, _plan(plan), _plan(plan).desc.q_heads)


@torch.library.register_fake("treeattn::merge", lib=_library)
def _(o: Any, lse: Any, plan: int, fields: Any = None, names: str = "", **bases: int) -> Any:
    return _fake_outputs(o, _plan(plan), _plan(plan).heads)
