"""PEP 517: makes the wheel of this tree with the Rust that is there, or of an installed library.

Why not maturin: the library is no extension module, but is installed by `make -C cbindings install`, header, CMake and
pkg-config files with it, and a wheel is that tree beside Python files. A backend of the tree's own needs nothing from an index,
so that a machine without one builds it, too.

    TREEATTN_PREFIX   a prefix in which the library is installed, to pack instead of building it
    and what cargo and build.rs read: CARGO_TARGET_DIR, TREEATTN_CUDA, TREEATTN_NVCC, ...
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import tomllib
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
TOP = HERE.parents[1]
PACKAGE = HERE / "treeattn"
EPOCH = (1980, 1, 1, 0, 0, 0)
OLDEST_GLIBC = 17


class UnsupportedOperation(Exception):
    """What a frontend takes as "no such artefact"."""


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return []


def build_sdist(sdist_directory: str, config_settings: dict | None = None) -> str:
    raise UnsupportedOperation("the sources of the wheel are the repository; build from a checkout")


def _version() -> str:
    return tomllib.loads((TOP / "Cargo.toml").read_text())["package"]["version"]


def _project() -> dict:
    return tomllib.loads((HERE / "pyproject.toml").read_text())["project"]


def _metadata() -> str:
    project = _project()
    lines = ["Metadata-Version: 2.4", f"Name: {project['name']}", f"Version: {_version()}", f"Summary: {project['description']}"]
    lines += [f"License-Expression: {project['license']}", f"Requires-Python: {project['requires-python']}"]
    lines += ["License-File: LICENSE-MIT", "License-File: LICENSE-APACHE"]
    lines.append("Description-Content-Type: text/markdown")
    return "\n".join([*lines, "", (HERE / "README.md").read_text()])


def _entry_points() -> str:
    project = _project()
    groups = {"console_scripts": project["scripts"]} | project["entry-points"]
    return "\n".join(f"[{group}]\n" + "".join(f"{name} = {to}\n" for name, to in found.items()) for group, found in groups.items())


def _install(prefix: Path) -> None:
    subprocess.run(["make", "-C", str(TOP / "cbindings"), "install", f"PREFIX={prefix}"], check=True)


def _soname(library: bytes) -> str:
    major, minor = _version().split(".")[:2]
    name = f"libtreeattn.so.0.{minor}" if major == "0" else f"libtreeattn.so.{major}"
    if name.encode() not in library:
        raise SystemExit(f"the library to pack has another soname than {name}")
    return name


def _tag(library: bytes) -> str:
    """The oldest glibc that has every symbol that the library asks for."""
    minor = max([OLDEST_GLIBC, *(int(found) for found in re.findall(rb"GLIBC_2\.(\d+)\0", library))])
    return f"py3-none-manylinux_2_{minor}_{sysconfig.get_platform().rpartition('-')[2]}"


def _library_files(prefix: Path) -> dict[str, bytes]:
    """What was installed, as the wheel has it: no links, which wheels do not know, and paths from the file's own place."""
    version = _version()
    library = (prefix / "lib" / "libtreeattn.so").read_bytes()
    soname = _soname(library)
    files = {f"lib/{soname}": library, "lib/libtreeattn.a": (prefix / "lib" / "libtreeattn.a").read_bytes()}
    # What `-ltreeattn` finds: a script for the linker in place of a link.
    files["lib/libtreeattn.so"] = f"/* GNU ld script */\nINPUT({soname})\n".encode()
    for header in ("treeattn.h", "treeattn.hpp"):
        files[f"include/{header}"] = (prefix / "include" / header).read_bytes()
    for name in ("treeattnConfig.cmake", "treeattnConfigVersion.cmake"):
        text = (prefix / "lib" / "cmake" / "treeattn" / name).read_text()
        files[f"lib/cmake/treeattn/{name}"] = text.replace(f"libtreeattn.so.{version}", soname).encode()
    text = (prefix / "lib" / "pkgconfig" / "treeattn.pc").read_text()
    moved = re.sub(r"^(prefix|libdir|includedir)=.*$", "", text, flags=re.M).lstrip()
    places = "prefix=${pcfiledir}/../..\nlibdir=${prefix}/lib\nincludedir=${prefix}/include\n\n"
    files["lib/pkgconfig/treeattn.pc"] = (places + moved).encode()
    return files


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: dict | None = None) -> str:
    info = f"treeattn-{_version()}.dist-info"
    folder = Path(metadata_directory, info)
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(_metadata())
    (folder / "entry_points.txt").write_text(_entry_points())
    return info


def build_wheel(wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None) -> str:
    installed = os.environ.get("TREEATTN_PREFIX")
    staging = Path(tempfile.mkdtemp())
    try:
        if not installed:
            _install(staging)
        found = _library_files(Path(installed) if installed else staging)
    finally:
        shutil.rmtree(staging)
    files = {path.relative_to(HERE).as_posix(): path.read_bytes() for path in sorted(PACKAGE.glob("*.py"))}
    files |= {f"treeattn/{name}": content for name, content in found.items()}
    soname = next(name for name in found if name.startswith("lib/libtreeattn.so."))
    tag = _tag(found[soname])
    info = f"treeattn-{_version()}.dist-info"
    files[f"{info}/METADATA"] = _metadata().encode()
    files[f"{info}/entry_points.txt"] = _entry_points().encode()
    for name in ("LICENSE-MIT", "LICENSE-APACHE"):
        files[f"{info}/licenses/{name}"] = (TOP / name).read_bytes()
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: treeattn_build\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    name = f"treeattn-{_version()}-{tag}.whl"
    record = ""
    with zipfile.ZipFile(Path(wheel_directory, name), "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, content in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record += f"{path},sha256={digest},{len(content)}\n"
            _put(wheel, path, content)
        _put(wheel, f"{info}/RECORD", f"{record}{info}/RECORD,,\n".encode())
    return name


def _put(wheel: zipfile.ZipFile, path: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(path, EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (0o100755 if ".so." in path else 0o100644) << 16
    wheel.writestr(entry, content)
