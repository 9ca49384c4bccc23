"""Two processes, a GPU each: steps on torch's streams, in graphs, beside NCCL, and beside a rank that is killed."""

from __future__ import annotations

import re
import unittest
from importlib.util import find_spec

from test_torch_ranks import HERE, ranks


def gpus() -> int:
    if not find_spec("torch"):
        return 0
    import torch

    return torch.cuda.device_count()


@unittest.skipUnless(gpus() >= 2, "two GPUs and a torch for them are wanted")
class Gpus(unittest.TestCase):
    def run_cases(self, *names: str, killed: int | None = None) -> None:
        for text in ranks(2, str(HERE / "gpu_cases.py"), *names, killed=killed):
            self.assertEqual(re.findall(r"^passed (\w+)$", text, re.M), list(names), text)

    def test_steps(self) -> None:
        self.run_cases("eager", "partial_and_merge", "replayed", "two_streams", "beside_nccl", "wrapped")

    def test_a_killed_rank(self) -> None:
        self.run_cases("killed", killed=1)


if __name__ == "__main__":
    unittest.main()
