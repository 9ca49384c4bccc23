"""Tensors of other libraries as the library takes them: an address, bytes and byte strides. Copies nothing.

Taken are torch's tensors (told by `data_ptr`), what has `__cuda_array_interface__` or `__array_interface__` (NumPy, CuPy), what
has `__dlpack__` (JAX and others), what has Python's buffer protocol (bytearray, array, memoryview), and a `View`: an address,
for all else.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from treeattn import _abi

DTYPE_NAMES = {
    "float32": _abi.DTYPE_F32,
    "float16": _abi.DTYPE_F16,
    "bfloat16": _abi.DTYPE_BF16,
    "float8_e4m3fn": _abi.DTYPE_F8_E4M3,
    "float8_e5m2": _abi.DTYPE_F8_E5M2,
    "int8": _abi.DTYPE_INT8,
}


@dataclass
class View:
    """Where a tensor lies. `dtype` is a name such as "float32"; strides are bytes; `owner` keeps the memory alive."""

    data: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    itemsize: int
    dtype: str
    device: int = 0
    owner: Any = None

    @property
    def bytes(self) -> int:
        """From the first element to the end of the last."""
        if 0 in self.shape:
            return 0
        return sum((size - 1) * step for size, step in zip(self.shape, self.stride)) + self.itemsize

    @property
    def contiguous(self) -> bool:
        return self.stride == packed(self.shape, self.itemsize) or 0 in self.shape


def packed(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Byte strides of a row-major tensor."""
    strides, step = [], itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


_TYPESTR = {"f4": "float32", "f2": "float16", "i1": "int8", "i4": "int32", "u1": "uint8", "b1": "bool", "f8": "float64"}
_FORMAT = {"f": "float32", "e": "float16", "b": "int8", "i": "int32", "l": "int64", "B": "uint8", "?": "bool", "d": "float64"}


def view(tensor: Any) -> View:
    """What a tensor of another library is.

    @raises TypeError: it is none that this module knows.
    """
    if isinstance(tensor, View):
        return tensor
    if hasattr(tensor, "data_ptr") and hasattr(tensor, "element_size"):
        size = tensor.element_size()
        stride = tuple(step * size for step in tensor.stride())
        device = tensor.device.index or 0 if tensor.device.type == "cuda" else -1
        code = _abi.DEVICE_CPU * 65536 if device < 0 else _abi.DEVICE_CUDA * 65536 + device
        return View(tensor.data_ptr(), tuple(tensor.shape), stride, size, str(tensor.dtype).rpartition(".")[2], code, tensor)
    for name, kind in (("__cuda_array_interface__", _abi.DEVICE_CUDA), ("__array_interface__", _abi.DEVICE_CPU)):
        facts = getattr(tensor, name, None)
        if facts is not None:
            itemsize = int(facts["typestr"][2:])
            dtype = _TYPESTR.get(facts["typestr"][1:], facts["typestr"])
            if facts["typestr"].startswith(">"):
                raise TypeError(f"a tensor of {facts['typestr']}: its bytes are in the other order")
            shape = tuple(facts["shape"])
            stride = facts.get("strides") or packed(shape, itemsize)
            return View(facts["data"][0], shape, tuple(stride), itemsize, dtype, kind * 65536, tensor)
    if hasattr(tensor, "__dlpack__"):
        return _dlpack(tensor)
    try:
        memory = memoryview(tensor)
    except TypeError:
        raise TypeError(f"{type(tensor).__name__} is no tensor: it has neither an address, nor __array_interface__, "
                        "nor __dlpack__, nor a buffer") from None  # fmt: skip
    if memory.readonly:
        raise TypeError("the buffer is read-only; the library takes memory that may be written")
    whole = memory if memory.c_contiguous else None
    if whole is None:
        raise TypeError("the buffer is not contiguous")
    holder = (ctypes.c_char * memory.nbytes).from_buffer(memory)
    dtype = _FORMAT.get(memory.format.lstrip("@=<"), memory.format)
    return View(ctypes.addressof(holder), memory.shape or (), memory.strides or (), memory.itemsize, dtype, 0, holder)


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_DL_CPU, _DL_CUDA, _DL_CUDA_HOST = 1, 2, 3
_DL_CODES = {(0, 8): "int8", (0, 32): "int32", (1, 8): "uint8", (2, 16): "float16", (2, 32): "float32", (2, 64): "float64",
             (4, 16): "bfloat16", (6, 8): "bool"}  # fmt: skip


def _dlpack(tensor: Any) -> View:
    # The capsule is kept, not consumed: what it borrows lives until the view goes.
    capsule = tensor.__dlpack__()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    found = _DLTensor.from_address(pointer(capsule, b"dltensor"))
    if found.device_type not in (_DL_CPU, _DL_CUDA, _DL_CUDA_HOST) or found.lanes != 1:
        raise TypeError(f"a DLPack tensor of device type {found.device_type} and {found.lanes} lanes")
    shape = tuple(found.shape[i] for i in range(found.ndim))
    size = found.bits // 8
    strides = tuple(found.strides[i] * size for i in range(found.ndim)) if found.strides else packed(shape, size)
    dtype = _DL_CODES.get((found.code, found.bits), f"DLPack {found.code}, {found.bits} bits")
    device = _abi.DEVICE_CUDA * 65536 + found.device_id if found.device_type == _DL_CUDA else 0
    return View((found.data or 0) + found.byte_offset, shape, strides, size, dtype, device, (tensor, capsule))


def dtype_code(name: str) -> int:
    """The library's number for an element type, "float32" or "f32" or "q8_0".

    @raises TypeError: the library has no such type.
    """
    code = DTYPE_NAMES.get(name) or getattr(_abi, f"DTYPE_{name.upper()}", 0)
    if not code:
        raise TypeError(f"the library has no element type {name}")
    return code


def fill(target: _abi.Tensor, tensor: View | None) -> None:
    """Writes a view into a `treeattn_tensor_t`."""
    if tensor is None:
        target.data, target.bytes, target.stride[:] = None, 0, (0, 0, 0, 0)
        return
    target.data, target.bytes = tensor.data, tensor.bytes
    target.stride[:] = (*tensor.stride, 0, 0, 0, 0)[:4]
