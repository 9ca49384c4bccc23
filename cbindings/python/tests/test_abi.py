"""The structs and constants of _abi.py against the header: what the generator writes, and what a C compiler says."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from treeattn import _abi

HERE = Path(__file__).resolve().parent
INCLUDE = HERE.parents[2] / "include"


class Abi(unittest.TestCase):
    def test_generated_file_is_what_the_header_says(self) -> None:
        generator = HERE.parent / "generate.py"
        run = subprocess.run([sys.executable, str(generator), "--check"], capture_output=True, text=True)
        self.assertEqual(run.returncode, 0, run.stderr)

    def test_sizes_offsets_and_constants_are_those_of_c(self) -> None:
        lines, expected = [], []
        for name, struct in _abi.STRUCTS.items():
            lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
            expected.append(f"{name} {ctypes.sizeof(struct)}")
            for field, *_ in struct._fields_:
                member = f"(({name} *)0)->{field}"
                lines.append(f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof {member});')
                place = getattr(struct, field)
                expected.append(f"{name}.{field} {place.offset} {place.size}")
        for name, value in vars(_abi).items():
            if name.isupper() and isinstance(value, int):
                lines.append(f'printf("TREEATTN_{name} %d\\n", (int)TREEATTN_{name});')
                expected.append(f"TREEATTN_{name} {value}")
        self.assertGreater(len(expected), 200)
        source = "#include <stdio.h>\n#include <treeattn.h>\nint main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
        with tempfile.TemporaryDirectory() as folder:
            program = str(Path(folder, "abi"))
            subprocess.run(["cc", "-w", f"-I{INCLUDE}", "-x", "c", "-", "-o", program], input=source, text=True, check=True)
            found = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
        self.assertEqual(found, expected)

    def test_every_function_of_the_symbol_list_is_there(self) -> None:
        listed = (HERE.parents[1] / "symbols.txt").read_text().splitlines()
        self.assertEqual(sorted(_abi.FUNCTIONS), sorted(line for line in listed if line.startswith("treeattn_")))


if __name__ == "__main__":
    unittest.main()
