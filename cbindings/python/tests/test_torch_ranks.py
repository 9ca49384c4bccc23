"""Processes over gloo: torch's ops, torch.compile, the engines' conventions, faults, the plugins, README's sample, the example.

The ranks of a test are started once for all of its cases, since to import torch takes longer than they do.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import unittest
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "llama.py"


def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ranks(world: int, program: str, *arguments: str, timeout: float = 300, killed: int | None = None) -> list[str]:
    """Runs a program as `world` processes, as torchrun would; what each printed. Fails where one does; `killed` is to be killed."""
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, program, *arguments]
    started = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)  # fmt: skip
        for rank in range(world)
    ]
    try:
        texts = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, (process, text) in enumerate(zip(started, texts)):
        if process.returncode != (-signal.SIGKILL if rank == killed else 0):
            raise AssertionError(f"rank {rank} ended with {process.returncode}:\n{text}")
    return texts


@unittest.skipUnless(find_spec("torch"), "torch is not installed; `make test-torch` installs it")
class Ranks(unittest.TestCase):
    def run_cases(self, world: int, *names: str) -> None:
        for text in ranks(world, str(HERE / "cases.py"), *names):
            self.assertEqual(re.findall(r"^passed (\w+)$", text, re.M), list(names), text)

    def test_two_ranks(self) -> None:
        self.run_cases(2, "decode", "inference", "partial_and_merge", "compiled", "conventions", "padding", "vllm_plugin", "sglang_plugin",
                       "dlpack", "errors", "deadline")  # fmt: skip

    def test_four_ranks(self) -> None:
        self.run_cases(4, "decode", "partial_and_merge", "conventions", "tree_over_sendrecv", "lost_rank")

    def test_sample_of_the_readme(self) -> None:
        sample = re.findall(r"```python\n(.*?)```", (HERE.parent / "README.md").read_text(), re.S)[0]
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder, "sample.py")
            program.write_text(sample)
            for rank, text in enumerate(ranks(2, str(program))):
                found = re.search(rf"rank {rank} of 2: largest difference (\S+)", text)
                self.assertIsNotNone(found, text)
                self.assertLess(float(found[1]), 1e-6)

    def test_llama_decodes_the_same_tokens_over_ranks_as_one_alone(self) -> None:
        texts = ranks(2, str(EXAMPLE), "--tiny", "--repeats", "1")
        tokens = re.findall(r"tokens by (\w+): (.*)$", "\n".join(texts), re.M)
        self.assertEqual(sorted(name for name, _ in tokens), ["allreduce3"] * 2 + ["one"] + ["ring"] * 2 + ["treeattn"] * 2)
        self.assertEqual(len({found for _, found in tokens}), 1, tokens)
        self.assertEqual(len(tokens[0][1].split()), 10)


if __name__ == "__main__":
    unittest.main()
