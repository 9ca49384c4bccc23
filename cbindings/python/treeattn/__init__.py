"""libtreeattn: exact decode attention over a KV cache that is sharded along the sequence.

    Runtime   what a process sets up once
    Comm      one rank's end of a communicator: `Comm.local` in one process, `Comm.from_transport`, `Comm.from_nccl`,
              `Comm.wrap_nccl`
    Plan      a shape made ready on one rank: `decode`, `partial`, `merge`
    Stream    an in-order queue of steps
    Buffer    memory of a device

These are the objects of `treeattn.h`, which is the manual of what they do: shapes, units, ownership, threads, errors. Fields
of its structs are keyword arguments of the same names. Tensors are torch's, NumPy's, or anything with DLPack, an array interface
or a buffer; nothing is copied, and they have to live until the step is done. A status that is not TREEATTN_OK is raised as
`Error`, with the code and the rank. Calls release the interpreter's lock.

Nothing but Python's standard library is needed.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from treeattn import _abi, _c
from treeattn._arguments import decode_arguments, describe, merge_arguments
from treeattn._c import Error, check, failure, lib, sized
from treeattn._tensors import View, view

globals().update({kind.__name__: kind for kind in _c.ERRORS.values()})
globals().update({name: value for name, value in vars(_abi).items() if name.isupper() and isinstance(value, int)})

__version__ = f"{_abi.VERSION_MAJOR}.{_abi.VERSION_MINOR}.{_abi.VERSION_PATCH}"
__all__ = ["Buffer", "Comm", "Error", "Placement", "Plan", "Runtime", "Stream", "View", "cpu", "cuda", "default_runtime", "describe",
           "head_range", "version", "view"]  # fmt: skip
__all__ += [kind.__name__ for kind in _c.ERRORS.values()]

def version() -> str:
    """The version of the library that is loaded."""
    return lib.treeattn_version().decode()


def cpu(n: int = 0) -> int:
    """The CPUs: 0 is all of them, 1 + n NUMA node n."""
    return _abi.DEVICE_CPU * 65536 + n


def cuda(n: int = 0) -> int:
    """CUDA device n, by the driver's ordinal."""
    return _abi.DEVICE_CUDA * 65536 + n


def head_range(heads: int, world: int, rank: int) -> tuple[int, int]:
    """First head and number of heads of a rank in a scattered output."""
    first, count = ctypes.c_int32(), ctypes.c_int32()
    check(lib.treeattn_head_range(heads, world, rank, ctypes.byref(first), ctypes.byref(count)))
    return first.value, count.value


class _Object:
    """A handle and what destroys it."""

    _destroy: str

    def __init__(self, handle: int | None) -> None:
        self.handle = handle

    def close(self) -> None:
        """Destroys the object, as the C call does. Closing it twice does nothing."""
        handle, self.handle = self.handle, None
        if handle is not None:
            check(getattr(lib, self._destroy)(handle))

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Errors have nobody to go to here; the library keeps what it could not destroy.
        handle, self.handle = getattr(self, "handle", None), None
        if handle is not None and lib is not None:
            getattr(lib, self._destroy)(handle)


class Runtime(_Object):
    """A process's use of the library.

    @param cpu_isa instruction set of the CPU backend, "avx2" for example; None: the best that the machine has.
    """

    _destroy = "treeattn_runtime_destroy"

    def __init__(self, cpu_isa: str | None = None) -> None:
        handle = ctypes.c_void_p()
        config = sized(_abi.RuntimeConfig, cpu_isa=cpu_isa.encode() if cpu_isa else None)
        check(lib.treeattn_runtime_create(ctypes.byref(config), ctypes.byref(handle)))
        super().__init__(handle.value)
        self._log: Any = None

    def device_count(self, kind: int) -> int:
        """How many devices of a kind (DEVICE_CPU, DEVICE_CUDA) can be used on this machine."""
        count = ctypes.c_int32()
        check(lib.treeattn_runtime_device_count(self.handle, kind, ctypes.byref(count)))
        return count.value

    def device_info(self, device: int) -> dict[str, Any]:
        """What a device is: device, units, memory, name, isa."""
        info = sized(_abi.DeviceInfo)
        check(lib.treeattn_runtime_device_info(self.handle, device, ctypes.byref(info)))
        return {"device": info.device, "units": info.units, "memory": info.memory} | {
            "name": info.name.decode(errors="replace"),
            "isa": info.isa.decode(errors="replace"),
        }

    def set_log(self, receiver: Callable[[int, str], None] | None) -> None:
        """Sets who receives log lines, as (level, message), or removes it. Called from any thread; must not call the library."""
        call = _abi.LogCallback((lambda level, text, _: receiver(level, text.decode())) if receiver else 0)
        check(lib.treeattn_runtime_set_log_callback(self.handle, call, None))
        self._log = call

    def selfcheck(self, device: int = 0, ranks: int = 0, **desc: Any) -> dict[str, Any]:
        """Runs a shape against float64 on this machine; the fields of the report. `passed` is what to look at."""
        desc = {"q_heads": 8, "kv_heads": 2, "head_dim_qk": 64, "max_batch": 2, "max_query_tokens": 2, "max_kv_length": 1024} | desc
        report, config = sized(_abi.SelfcheckReport), sized(_abi.SelfcheckConfig, ranks=ranks)
        shape = describe(**desc)
        check(lib.treeattn_selfcheck(self.handle, device, ctypes.byref(shape), ctypes.byref(config), ctypes.byref(report)))
        fields = {name: getattr(report, name) for name, *_ in report._fields_ if name != "struct_size"}
        return fields | {"message": report.message.decode(errors="replace")}

    def merge_partials(self, o: Any, lse: Any, out: Any, out_lse: Any = None, *, device: int = 0, stream: Stream | None = None,
                       **fields: Any) -> None:  # fmt: skip
        """Merges partials that lie in one place: o [partial, token, head, dim], lse [partial, token, head]. Fields as of `Plan.merge`."""
        partials, _, heads, dim = view(o).shape
        args = merge_arguments(o, lse, out, out_lse, **fields)
        args.heads, args.head_dim = heads, dim
        check(lib.treeattn_merge_partials(self.handle, device, ctypes.byref(args), partials, stream and stream.handle))


_default: list[Runtime] = []
_default_lock = threading.Lock()


def default_runtime() -> Runtime:
    """The runtime that is used where none is given; made at the first call."""
    with _default_lock:
        if not _default:
            _default.append(Runtime())
        return _default[0]


class Stream(_Object):
    """An in-order queue of steps on a device."""

    _destroy = "treeattn_stream_destroy"

    def __init__(self, device: int = 0, *, cuda_stream: int | None = None, runtime: Runtime | None = None) -> None:
        """@param cuda_stream a cudaStream_t of the caller's to enqueue on; 0 is the legacy default stream. None: a new stream."""
        self.runtime = runtime or default_runtime()
        handle = ctypes.c_void_p()
        if cuda_stream is None:
            check(lib.treeattn_stream_create(self.runtime.handle, device, ctypes.byref(handle)))
        else:
            check(lib.treeattn_stream_wrap_cuda(self.runtime.handle, device, cuda_stream or None, ctypes.byref(handle)))
        super().__init__(handle.value)

    def synchronize(self) -> None:
        """Waits until everything enqueued is done; raises the first error of a step that was enqueued since the last call."""
        check(lib.treeattn_stream_synchronize(self.handle))


class Buffer(_Object):
    """Zeroed memory of a device. Has an array interface of bytes: `numpy.asarray(buffer).view(...)`."""

    _destroy = "treeattn_buffer_destroy"

    def __init__(self, size: int, device: int = 0, *, runtime: Runtime | None = None) -> None:
        self.runtime, self.size, self.device = runtime or default_runtime(), size, device
        handle, data = ctypes.c_void_p(), ctypes.c_void_p()
        check(lib.treeattn_buffer_alloc(self.runtime.handle, device, size, ctypes.byref(handle)))
        super().__init__(handle.value)
        check(lib.treeattn_buffer_data(handle, ctypes.byref(data)))
        self.data = data.value
        facts = {"shape": (size,), "typestr": "|u1", "data": (self.data, False), "version": 3}
        setattr(self, "__cuda_array_interface__" if device >= cuda() else "__array_interface__", facts)

    def upload(self, source: Any, offset: int = 0) -> None:
        """Copies host memory into the buffer."""
        host = view(source)
        check(lib.treeattn_buffer_upload(self.handle, offset, host.data, host.bytes))

    def download(self, target: Any, offset: int = 0) -> None:
        """Copies from the buffer to host memory. Work that still writes it is not waited for."""
        host = view(target)
        check(lib.treeattn_buffer_download(self.handle, offset, host.data, host.bytes))


def _config(fields: dict[str, Any]) -> ctypes.Structure:
    fields = dict(fields)
    if isinstance(fields.get("nccl_path"), str):
        fields["nccl_path"] = fields["nccl_path"].encode()
    return sized(_abi.CommConfig, **fields)


class Comm(_Object):
    """One rank's end of a communicator.

    @param config fields of `treeattn_comm_config_t`: `setup_timeout_ns`, `step_timeout_ns`, `threads_per_rank`, ...
    """

    _destroy = "treeattn_comm_destroy"

    def __init__(self, handle: int, runtime: Runtime, device: int, keep: Any = None) -> None:
        super().__init__(handle)
        self.runtime, self.device, self._keep = runtime, device, keep
        rank, world = ctypes.c_int32(), ctypes.c_int32()
        check(lib.treeattn_comm_rank(handle, ctypes.byref(rank)))
        check(lib.treeattn_comm_world(handle, ctypes.byref(world)))
        self.rank, self.world = rank.value, world.value

    @classmethod
    def local(cls, devices: Sequence[int], *, runtime: Runtime | None = None, **config: Any) -> list[Comm]:
        """A communicator whose ranks all live in this process: every rank's end of it."""
        runtime = runtime or default_runtime()
        handles = (ctypes.c_void_p * len(devices))()
        places = (ctypes.c_int32 * len(devices))(*devices)
        settings = _config(config)
        check(lib.treeattn_comm_create_local(runtime.handle, len(devices), places, ctypes.byref(settings), handles))
        return [cls(handle, runtime, device) for handle, device in zip(handles, devices)]

    @classmethod
    def from_transport(
        cls,
        allgather: Callable[[int, int, int, int, int], int],
        world: int,
        rank: int,
        *,
        sendrecv: Callable[..., int] | None = None,
        flags: int = 0,
        device: int = 0,
        runtime: Runtime | None = None,
        **config: Any,
    ) -> Comm:
        """This rank's end of a communicator whose ranks the engine connects. Collective.

        @param allgather (send, recv, bytes, timeout_ns, abort) -> 0, with addresses: see `treeattn_transport_t`, whose deadlines
                         it keeps. An exception is a failure; it becomes the cause of the error that is raised.
        @param sendrecv  (send, send_bytes, to, recv, recv_bytes, from, timeout_ns, abort) -> 0; TREE and RING need it.
        """
        runtime = runtime or default_runtime()
        raised: list[BaseException] = []

        def guarded(call: Callable[..., int]) -> Callable[..., int]:
            def callback(_: Any, *arguments: Any) -> int:
                try:
                    return call(*arguments)
                except BaseException as error:  # nothing unwinds into the library
                    raised.append(error)
                    return -1

            return callback

        types = dict(_abi.Transport._fields_)
        callbacks = sized(_abi.Transport, flags=flags, allgather=types["allgather"](guarded(allgather)))
        if sendrecv:
            callbacks.sendrecv = types["sendrecv"](guarded(sendrecv))
        settings, handle = _config(config), ctypes.c_void_p()
        status = lib.treeattn_comm_create_from_transport(
            runtime.handle, ctypes.byref(callbacks), world, rank, device, ctypes.byref(settings), ctypes.byref(handle)
        )
        if status:
            raise failure(status) from (raised[-1] if raised else None)
        comm = cls(handle.value, runtime, device, keep=callbacks)
        comm._raised = raised
        return comm

    _raised: list[BaseException] = []

    @classmethod
    def from_nccl(cls, unique_id: bytes, world: int, rank: int, device: int, *, runtime: Runtime | None = None, **config: Any) -> Comm:
        """This rank's end of a communicator whose ranks NCCL connects, by the 128 bytes of `nccl_unique_id`. Collective."""
        runtime = runtime or default_runtime()
        settings, handle = _config(config), ctypes.c_void_p()
        check(lib.treeattn_comm_create_nccl(
            runtime.handle, unique_id, world, rank, device, ctypes.byref(settings), ctypes.byref(handle)
        ))  # fmt: skip
        return cls(handle.value, runtime, device, keep=None)

    @classmethod
    def wrap_nccl(cls, nccl_comm: int, device: int, *, runtime: Runtime | None = None, **config: Any) -> Comm:
        """This rank's end of a communicator with the ranks of an engine's own NCCL communicator, by the address of its `ncclComm_t`.

        Collective. The engine's one is split, and not used after that; nobody uses it meanwhile. (torch's is
        `group._get_backend(torch.device("cuda"))._comm_ptr()`, once the group has done something.)
        """
        runtime = runtime or default_runtime()
        settings, handle = _config(config), ctypes.c_void_p()
        check(lib.treeattn_comm_wrap_nccl(runtime.handle, nccl_comm, device, ctypes.byref(settings), ctypes.byref(handle)))
        return cls(handle.value, runtime, device, keep=None)

    @staticmethod
    def nccl_unique_id(runtime: Runtime | None = None) -> bytes:
        """A fresh name for a communicator to be: one rank asks for it and brings it to all others."""
        out = ctypes.create_string_buffer(128)
        check(lib.treeattn_nccl_unique_id((runtime or default_runtime()).handle, out))
        return out.raw

    def status(self) -> dict[str, Any]:
        """Its health: code, rank, step, plan, sequence, broken, message. From any thread, at any time."""
        status = sized(_abi.CommStatus)
        check(lib.treeattn_comm_status(self.handle, ctypes.byref(status)))
        fields = {name: getattr(status, name) for name, *_ in status._fields_ if name != "struct_size"}
        return fields | {"message": status.message.decode(errors="replace")}

    def describe(self) -> str:
        """What it is, as JSON."""
        needed = ctypes.c_size_t()
        check(lib.treeattn_comm_describe(self.handle, None, 0, ctypes.byref(needed)))
        text = ctypes.create_string_buffer(needed.value)
        check(lib.treeattn_comm_describe(self.handle, text, needed.value, None))
        return text.value.decode()

    def abort(self) -> None:
        """Breaks it: every wait on it ends at once. From any thread, at any time."""
        check(lib.treeattn_comm_abort(self.handle))

    def failure(self, status: int) -> Error:
        """The exception of a status that a step of this communicator returned, with the rank where there is one."""
        error = failure(status)
        found = sized(_abi.CommStatus)
        if self.handle is not None and lib.treeattn_comm_status(self.handle, ctypes.byref(found)) == 0:
            if found.code == status:
                error.rank = found.rank
        # What a step on a CPU has returned the status does not tell again; the message does.
        named = re.search(r" on rank (\d+)\b", str(error)) if error.rank < 0 and status == _abi.ERROR_INVALID_DATA else None
        if named:
            error.rank = int(named[1])
        if self._raised:
            error.__cause__ = self._raised[-1]
            self._raised.clear()
        return error

    def plan(self, **desc: Any) -> Plan:
        """Makes a shape ready on this rank. Collective; one thread with all local ranks takes `Plan.all`."""
        shape, handle = describe(**desc), ctypes.c_void_p()
        status = lib.treeattn_plan_create(self.handle, ctypes.byref(shape), ctypes.byref(handle))
        if status:
            raise self.failure(status)
        return self._made(handle.value, shape)

    def _made(self, handle: int, shape: _abi.AttentionDesc) -> Plan:
        return Plan(handle, self, shape)


class Plan(_Object):
    """A shape made ready on one rank. One plan serves all layers of a shape, one step after the other.

    `desc` is what it was made of, `heads` how many its output has on this rank.
    """

    _destroy = "treeattn_plan_destroy"

    def __init__(self, handle: int, comm: Comm, desc: _abi.AttentionDesc) -> None:
        super().__init__(handle)
        self.comm, self.desc = comm, desc
        stats = self.stats()
        self.heads = stats["head_end"] - stats["head_begin"]

    @classmethod
    def all(cls, comms: Sequence[Comm], **desc: Any) -> list[Plan]:
        """The plans of all ranks of a local communicator, from one thread."""
        shape = describe(**desc)
        ends = (ctypes.c_void_p * len(comms))(*(comm.handle for comm in comms))
        handles = (ctypes.c_void_p * len(comms))()
        status = lib.treeattn_plan_create_all(len(comms), ends, ctypes.byref(shape), handles)
        if status:
            raise comms[0].failure(status)
        return [comm._made(handle, shape) for handle, comm in zip(handles, comms)]

    def arguments(self, q: Any, k: Any, v: Any, out: Any, lse: Any = None, *, batch: int | None = None, whole: bool = False,
                  **fields: Any) -> _abi.DecodeArgs:  # fmt: skip
        """A `treeattn_decode_args_t` of tensors: q [token, head, dim], k and v [sequence, token, kv head, dim] or pages.

        Index arrays are int32 and contiguous; `batch` is the length of `kv_length` where it is not given, and strides and numbers
        of pages are those of the arrays' shapes. Masks and scales broadcast as NumPy's arrays do. The tensors have to live as long
        as the struct is used.

        @param whole the outputs hold all heads, as those of `partial` do, and not the rank's own.
        """
        heads = self.desc.q_heads if whole else self.heads
        queries = self.desc.q_heads
        if self.desc.query_input == _abi.QUERY_INPUT_SCATTERED and not whole:
            _, queries = head_range(queries, self.comm.world, self.comm.rank)
        return decode_arguments(self.desc, (queries, heads), q, k, v, out, lse, batch, fields)

    def decode(self, *tensors: Any, stream: Stream | None = None, **fields: Any) -> None:
        """One step: attends this rank's shard, exchanges, writes the output over all ranks' keys. Collective.

        Arguments as of `arguments`. Without a stream a CPU plan runs it on the calling thread and waits there.
        """
        args = self.arguments(*tensors, **fields)
        self._run(lib.treeattn_plan_decode, args, stream)

    def partial(self, *tensors: Any, stream: Stream | None = None, **fields: Any) -> None:
        """This rank's partial alone, over all heads; no exchange. Arguments as of `arguments`."""
        self._run(lib.treeattn_plan_partial, self.arguments(*tensors, whole=True, **fields), stream)

    def merge(self, o: Any, lse: Any, out: Any, out_lse: Any = None, *, stream: Stream | None = None, **fields: Any) -> None:
        """The exchange alone: this rank's partial, o [token, head, dim] and lse [token, head], becomes the merged output.

        @param fields of `treeattn_merge_args_t`: `lse_base`, `out_lse_base` (2: to base 2), `flags` (MERGE_...), and tensors: `sum`,
                      `query_start`, `kv_length`. Collective.
        """
        args = merge_arguments(o, lse, out, out_lse, **fields)
        self._run(lib.treeattn_plan_merge, args, stream)

    def _run(self, call: Any, args: ctypes.Structure, stream: Stream | None) -> None:
        status = call(self.handle, ctypes.byref(args), stream and stream.handle)
        if status:
            raise self.comm.failure(status)

    def stats(self) -> dict[str, Any]:
        """What it has done so far, which algorithm it uses and why."""
        stats = sized(_abi.PlanStats)
        check(lib.treeattn_plan_stats(self.handle, ctypes.byref(stats)))
        fields = {name: getattr(stats, name) for name, *_ in stats._fields_ if name != "struct_size"}
        return fields | {"reason": stats.reason.decode(errors="replace")}

    def memory(self) -> dict[str, int]:
        """The bytes that it holds: workspace, window."""
        memory = sized(_abi.PlanMemory)
        check(lib.treeattn_plan_memory(self.handle, ctypes.byref(memory)))
        return {"workspace": memory.workspace, "window": memory.window}


class Placement:
    """Which rank holds which token: `owner`, `local_length`, `local_slot`, `global_position` of `treeattn.h`."""

    def __init__(self, kind: str = "contiguous", interleave: int = 0, *, world: int) -> None:
        self._placement = _abi.Placement(getattr(_abi, f"PLACEMENT_{kind.upper()}"), interleave)
        self.world = world

    def _ask(self, name: str, *arguments: int) -> int:
        found = ctypes.c_int32()
        check(getattr(lib, f"treeattn_placement_{name}")(
            ctypes.byref(self._placement), self.world, *arguments, ctypes.byref(found)
        ))  # fmt: skip
        return found.value

    def owner(self, global_length: int, position: int) -> int:
        """The rank that holds a position."""
        return self._ask("owner", global_length, position)

    def local_length(self, rank: int, global_length: int) -> int:
        """How many tokens of a sequence a rank holds."""
        return self._ask("local_length", rank, global_length)

    def local_slot(self, global_length: int, position: int) -> int:
        """The slot in which the owner of a position holds it."""
        return self._ask("local_slot", global_length, position)

    def global_position(self, rank: int, global_length: int, slot: int) -> int:
        """The position of a rank's slot."""
        return self._ask("global_position", rank, global_length, slot)
