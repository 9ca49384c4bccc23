"""The exchange of ranks on CPUs over torch's gloo: the callbacks of `treeattn_transport_t`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from time import monotonic

import torch
import torch.distributed as dist

_SECOND = 1_000_000_000


class Gloo:
    """An allgather and a sendrecv over a gloo group of this communicator's own, by the rules of `treeattn_transport_t`.

    What gloo is given are buffers of this object: an operation that is given up goes on in gloo's threads, and may still read and
    write them, until the time that it was given is over. After that the group is out of step, and every later call fails.
    """

    LOOK = 0.05  # seconds after which the abort flag is looked at again

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.world = group, group.size()
        self.lost = False
        self.buffers: dict[str, torch.Tensor] = {}
        # A wait for a message whose time is over closes gloo's connections, so that it cannot be made of short ones.
        self.waiter = ThreadPoolExecutor(1, "treeattn-gloo")

    def room(self, name: str, size: int) -> torch.Tensor:
        found = self.buffers.get(name)
        if found is None or found.numel() < size:
            with torch.inference_mode(False):  # one that is made in it cannot be written outside of it
                found = self.buffers[name] = torch.empty(max(size, 4096), dtype=torch.uint8)
        return found[:size]

    def until_ended(self, ended: Callable[[float], bool], timeout_ns: int, abort: int) -> bool:
        """Whether it has ended, asked again and again, before the time is over or the abort flag is set. What it raises is raised."""
        until = monotonic() + timeout_ns / _SECOND
        flag = ctypes.c_int32.from_address(abort)
        self.lost = True  # unless it ends well
        while not ended(max(min(until - monotonic(), self.LOOK), 0.001)):
            if flag.value or monotonic() >= until:
                return False
        self.lost = False
        return True

    def allgather(self, send: int, recv: int, size: int, timeout_ns: int, abort: int) -> int:
        if self.lost:
            return 2
        mine, everyone = self.room("mine", size), self.room("everyone", size * self.world)
        ctypes.memmove(mine.data_ptr(), send, size)
        work = self.group._allgather_base(everyone, mine)

        def ended(seconds: float) -> bool:
            try:
                work.wait(timedelta(seconds=seconds))
            except RuntimeError:
                if not work.is_completed():
                    return False
                work.wait()  # it has ended by now: raises what went wrong, if anything did
            return True

        if not self.until_ended(ended, timeout_ns, abort):
            return 1
        ctypes.memmove(recv, everyone.data_ptr(), size * self.world)
        return 0

    def sendrecv(self, send: int, send_size: int, to: int, recv: int, recv_size: int, source: int, timeout_ns: int, abort: int) -> int:
        if self.lost:
            return 2
        works = []
        if send_size:
            mine = self.room("sent", send_size)
            ctypes.memmove(mine.data_ptr(), send, send_size)
            works.append(self.group.send([mine], to, 0))
        theirs = self.room("received", recv_size)
        if recv_size:
            works.append(self.group.recv([theirs], source, 0))
        time = timedelta(seconds=max(timeout_ns / _SECOND, 0.001))
        waits = self.waiter.submit(lambda: [work.wait(time) for work in works])

        def ended(seconds: float) -> bool:
            try:
                waits.result(seconds)
            except TimeoutError:
                return False
            return True

        if not self.until_ended(ended, timeout_ns, abort):
            return 1
        ctypes.memmove(recv, theirs.data_ptr(), recv_size)
        return 0

    def close(self) -> None:
        """Leaves the group; one with an operation that was given up is left to end by itself."""
        self.waiter.shutdown(wait=False)
        if not self.lost and dist.is_initialized():
            dist.destroy_process_group(self.group)
