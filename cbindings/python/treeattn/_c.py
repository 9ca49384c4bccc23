"""The shared library: where it is, its functions, and its statuses as exceptions.

`lib` is what was loaded. It is looked for in this order: the file that the environment variable TREEATTN_LIBRARY names; the
one that the wheel carries; what the system's loader finds (LD_LIBRARY_PATH, ldconfig).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from treeattn import _abi

SONAME = f"libtreeattn.so.0.{_abi.VERSION_MINOR}" if _abi.VERSION_MAJOR == 0 else f"libtreeattn.so.{_abi.VERSION_MAJOR}"
OWN = Path(__file__).resolve().parent / "lib" / SONAME


class Error(RuntimeError):
    """A call of the library that failed.

    `code` is the status, `name` its name ("TIMEOUT"), `rank` the rank that the error is about, -1 where there is none. The text
    is the library's own: the argument, the value found and the value wanted. There is a subclass for every status, such as
    `treeattn.TimeoutError`.
    """

    code: int = 0
    name: str = ""

    def __init__(self, message: str, code: int | None = None, rank: int = -1) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        self.rank = rank


# What else some of them are, so that code which knows nothing of this library can catch them.
_ALSO: dict[str, type[BaseException]] = {
    "INVALID_ARGUMENT": ValueError,
    "TIMEOUT": TimeoutError,
    "PEER_LOST": ConnectionError,
    "NO_MEMORY": MemoryError,
    "UNSUPPORTED": NotImplementedError,
}
ERRORS: dict[int, type[Error]] = {}
for _constant, _code in list(vars(_abi).items()):
    if _constant.startswith("ERROR_"):
        _name = _constant.removeprefix("ERROR_")
        _title = "".join(_word.capitalize() for _word in _name.split("_")) + "Error"
        # NotImplementedError is a RuntimeError already.
        _bases = (Error, _ALSO[_name]) if _name in _ALSO else (Error,)
        ERRORS[_code] = type(_title, _bases, {"code": _code, "name": _name, "__module__": "treeattn"})


def _load() -> ctypes.CDLL:
    named = os.environ.get("TREEATTN_LIBRARY")
    path = named or (str(OWN) if OWN.exists() else SONAME)
    try:
        lib = ctypes.CDLL(path)
    except OSError as error:
        looked = f"TREEATTN_LIBRARY={named}" if named else f"{OWN} and the system's {SONAME}"
        raise ImportError(f"libtreeattn was not found (looked for {looked}): {error}") from error
    for name, (result, arguments) in _abi.FUNCTIONS.items():
        function = getattr(lib, name, None)
        if function is None:
            raise ImportError(f"{path} lacks {name}: it is older than this package, which is made for {_wanted()}")
        function.restype, function.argtypes = result, arguments
    if lib.treeattn_abi_version() < _abi.ABI_VERSION:
        raise ImportError(f"{path} has the binary interface {lib.treeattn_abi_version()}; this package needs {_wanted()}")
    return lib


def _wanted() -> str:
    version = f"{_abi.VERSION_MAJOR}.{_abi.VERSION_MINOR}.{_abi.VERSION_PATCH}"
    return f"version {version}, binary interface {_abi.ABI_VERSION}"


lib = _load()


def failure(status: int, rank: int = -1) -> Error:
    """The exception of a status that this thread's last call returned."""
    message = (lib.treeattn_last_error_message() or b"").decode(errors="replace")
    kind = ERRORS.get(status, Error)
    return kind(message or (lib.treeattn_status_string(status) or b"").decode(), status, rank)


def check(status: int) -> None:
    """Raises what a status stands for, unless it is TREEATTN_OK."""
    if status:
        raise failure(status)


def sized(struct: type[ctypes.Structure], **fields: object) -> ctypes.Structure:
    """A struct with its `struct_size`, as TREEATTN_..._INIT makes it, and these fields."""
    value = struct()
    value.struct_size = ctypes.sizeof(struct)
    for name, field in fields.items():
        setattr(value, name, field)
    return value
