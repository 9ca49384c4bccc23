"""The wheel as it is installed: it loads its own library, runs its self-check, and C programs build against what it carries."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import unittest
from pathlib import Path

import treeattn
from treeattn import _c

INSTALL = Path(__file__).resolve().parents[3] / "tests" / "install" / "main.c"
CONFIG = Path(sysconfig.get_path("scripts"), "treeattn-config")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


@unittest.skipUnless(_c.OWN.exists(), "not installed from a wheel")
class Wheel(unittest.TestCase):
    def test_loads_its_own_library(self) -> None:
        self.assertEqual(_c.lib._name, os.environ.get("TREEATTN_LIBRARY", str(_c.OWN)))
        self.assertEqual(treeattn.version(), treeattn.__version__)

    def test_module_prints_where_it_is_and_passes_its_self_check(self) -> None:
        text = run(sys.executable, "-m", "treeattn")
        self.assertIn(f"libtreeattn {treeattn.version()}", text)
        self.assertIn("bfloat16: passed", text)

    def test_library_that_is_not_there_is_named(self) -> None:
        done = subprocess.run([sys.executable, "-c", "import treeattn"], capture_output=True, text=True,
                              env={**os.environ, "TREEATTN_LIBRARY": "/nowhere/lib.so"})  # fmt: skip
        self.assertIn("TREEATTN_LIBRARY=/nowhere/lib.so", done.stderr)

    def test_c_program_builds_by_treeattn_config_and_by_pkg_config(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            program = str(Path(folder, "main"))
            flags = run(str(CONFIG), "--cflags", "--libs").split()
            run("cc", "-std=c99", str(INSTALL), "-o", program, *flags)
            self.assertIn(treeattn.version(), run(program))
            if shutil.which("pkg-config"):
                place = {"PKG_CONFIG_PATH": run(str(CONFIG), "--pkgconfigdir")}
                flags = run("pkg-config", "--cflags", "--libs", "treeattn", **place).split()
                run("cc", "-std=c99", str(INSTALL), "-o", program, *flags)
                self.assertIn(treeattn.version(), run(program, LD_LIBRARY_PATH=run(str(CONFIG), "--libdir")))
                flags = run("pkg-config", "--static", "--cflags", "--libs", "treeattn", **place).split()
                flags = ["-l:libtreeattn.a" if flag == "-ltreeattn" else flag for flag in flags]
                run("cc", "-std=c99", str(INSTALL), "-o", program, *flags)
                self.assertIn(treeattn.version(), run(program))

    def test_the_sample_of_the_readme_prints_what_it_says(self) -> None:
        text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
        sample = text.split("```python\n")[2].split("```")[0]  # the first is torch's
        self.assertEqual(run(sys.executable, "-c", sample), "[[[6.0, 4.0]]]")


if __name__ == "__main__":
    unittest.main()
