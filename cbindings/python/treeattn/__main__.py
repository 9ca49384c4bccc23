"""`python -m treeattn`: which library is loaded, the devices, and a self-check on each. Ends with 1 where one fails."""

from __future__ import annotations

import sys

import treeattn
from treeattn import _c


def main() -> int:
    runtime = treeattn.default_runtime()
    print(f"libtreeattn {treeattn.version()} (package {treeattn.__version__}), {_c.lib._name}")
    passed = True
    devices = [treeattn.cpu(n) for n in range(runtime.device_count(treeattn.DEVICE_CPU))]
    devices += [treeattn.cuda(n) for n in range(runtime.device_count(treeattn.DEVICE_CUDA))]
    for device in devices:
        info = runtime.device_info(device)
        name = f"cuda:{device - treeattn.cuda()}" if device >= treeattn.cuda() else f"cpu:{device}"
        print(f"{name}: {info['name']}, {info['units']} units, {info['memory'] >> 30} GiB, {info['isa']}")
        for dtype in ("float32", "float16", "bfloat16"):
            report = runtime.selfcheck(device, dtype=dtype)
            passed &= bool(report["passed"])
            print(f"  {dtype}: {'passed' if report['passed'] else 'FAILED'}: {report['message']}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
