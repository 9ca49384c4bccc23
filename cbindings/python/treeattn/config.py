"""`treeattn-config`: where the wheel has what a C or C++ program needs. Loads nothing.

    cc app.c $(treeattn-config --cflags --libs)
    cmake -DCMAKE_PREFIX_PATH=$(treeattn-config --prefix)
    PKG_CONFIG_PATH=$(treeattn-config --pkgconfigdir)
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    prefix = Path(__file__).resolve().parent
    answers = {
        "prefix": (f"{prefix}", "for CMAKE_PREFIX_PATH"),
        "includedir": (f"{prefix}/include", "the folder of treeattn.h"),
        "libdir": (f"{prefix}/lib", "the folder of the libraries"),
        "cmakedir": (f"{prefix}/lib/cmake/treeattn", "for treeattn_DIR"),
        "pkgconfigdir": (f"{prefix}/lib/pkgconfig", "for PKG_CONFIG_PATH"),
        "cflags": (f"-I{prefix}/include", "what the compiler needs"),
        "libs": (f"-L{prefix}/lib -Wl,-rpath,{prefix}/lib -ltreeattn", "what the linker needs"),
    }
    parser = argparse.ArgumentParser(prog="treeattn-config", description="Where the wheel has the library.")
    for name, (_, help) in answers.items():
        parser.add_argument(f"--{name}", action="store_true", help=help)
    wanted = [name for name, asked in vars(parser.parse_args()).items() if asked]
    if not wanted:
        parser.error("say what you want to know, such as --prefix")
    print(" ".join(answers[name][0] for name in wanted))


if __name__ == "__main__":
    main()
