"""Runs the tests of the plugin in ggml and libllama; the Makefile builds what they need.

    run.py --plugin PATH --out FOLDER

A short selection; everything with TREEATTN_TEST=full. Ends with 1 where something failed.
"""

import argparse
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
FULL = os.environ.get("TREEATTN_TEST") == "full"
STEPS, VOCABULARY, LAYERS, THREADS = 64, 256, 2, 2
MODELS = ("llama", "alibi", "sinks", "softcap", "mla")
CACHES = ("f16", "bf16", "q8_0", "q4_0")
# Sequences, and whether they share one cache as llama-server has it.
SLOTS = ((1, 1), (4, 1), (4, 0))
# Largest distance of an attention's output from float64 on the same queries and the same cache, in parts of the largest output.
EXACT = 2e-6
# Largest distance of a logit from that with float64 attention, in parts of the largest logit.
NEAR = 2e-3
# The same of ggml's own attention, which rounds queries to the cache's precision: that the reference is what ggml means.
NEAR_GGML = {"f16": 5e-3, "bf16": 1e-2, "q8_0": 3e-2, "q4_0": 8e-2}

failures = []


def fail(text):
    failures.append(text)
    print(f"  FAILED: {text}", flush=True)


class Client:
    """Runs the programs that the Makefile made, against one build of ggml."""

    def __init__(self, out, plugin):
        self.out, self.plugin = Path(out).resolve(), str(Path(plugin).resolve())

    def run(self, program, *arguments, build="openmp", plugin=None, text="", timeout=600, **environment):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("TREEATTN", "GGML"))}
        # Threads that spin slow everything down where others use the machine, too; how long a step takes is not asked here.
        env.update(OMP_WAIT_POLICY="passive", LD_LIBRARY_PATH=str(self.out / build), **environment)
        if plugin:
            env["GGML_BACKEND_PATH"] = str(plugin)
        return subprocess.run([str(self.out / program), *map(str, arguments)], env=env, input=text, text=True, timeout=timeout,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)

    def mode(self, name, ranks):
        """The environment of a mode: `honest`, `inline` or `hook`."""
        return {"TREEATTN_GGML_RANKS": str(ranks), "TREEATTN_GGML": {"honest": "device", "hook": ""}.get(name, name)}


class Decoding:
    """A case of decode.cpp, whatever computes its attention."""

    def __init__(self, model, cache, slots, flash="on", cache_v=None):
        self.model, self.cache, self.slots, self.flash = model, cache, slots, flash
        self.cache_v = cache_v or cache

    @property
    def name(self):
        kind = {(1, 1): "1", (4, 1): "4 unified", (4, 0): "4 split"}[self.slots]
        return f"{self.model} {self.cache}/{self.cache_v} slots {kind}" + (" -fa auto" if self.flash == "auto" else "")

    def file(self, out, who):
        return out / "logits" / f"{self.name} {who}".replace(" ", "_").replace("/", "_")

    def line(self, out, who, reference=None):
        return " ".join(map(str, (out / "models" / f"{self.model}.gguf", self.cache, self.cache_v, *self.slots, self.flash, THREADS,
                                  self.file(out, who), self.file(out, reference) if reference else "-")))

    def logits(self, out, who):
        return np.fromfile(self.file(out, who), np.float32).reshape(STEPS, self.slots[0], VOCABULARY)

    def steps(self):
        """Attentions that the plugin computes: a token a step, and the last chunk of each prompt."""
        return LAYERS * (STEPS + self.slots[0])


def whose_threads(build, mode):
    """Whose threads compute: a device has ggml's only where those are OpenMP's."""
    return "own" if (build, mode) == ("pool", "honest") else "ggml"


def decode(client, cases, who, reference=None, at_once=1, **options):
    """Runs the cases in one process; gives the counters of each, without those of a plugin where none was loaded, and `far`."""
    text = "".join(case.line(client.out, who, reference) + "\n" for case in cases)
    result = client.run("decode", at_once, text=text, timeout=1800, **options)
    lines = result.stdout.splitlines()
    if result.returncode or len(lines) != len(cases):
        fail(f"decoding with {who} ended with {result.returncode} after {len(lines)} of {len(cases)} cases: {result.stderr.strip()}")
        return None
    return [{k: float(v) if k == "far" else int(v) for k, v in re.findall(r"(\w+)=(\S+)", line)} for line in lines]


def distance(case, out, who):
    """Largest distance of the logits from the reference's, and the tokens that differ though the reference was sure of them."""
    exact, found = case.logits(out, "exact"), case.logits(out, who)
    scale = np.abs(exact).max()
    far = np.abs(found - exact).max() / scale if np.isfinite(found).all() else np.inf
    two = np.sort(exact, axis=-1)[..., -2:]
    sure = two[..., 1] - two[..., 0] > 2 * far * scale
    other = exact.argmax(-1) != found.argmax(-1)
    return far, int((sure & other).sum()), int(other.sum())


def test_decoding(client):
    (client.out / "logits").mkdir(exist_ok=True)
    every = [Decoding(*c) for c in itertools.product(MODELS, CACHES, SLOTS)]
    mixed = Decoding("llama", "q8_0", (1, 1), cache_v="q4_0")
    auto = Decoding("llama", "f16", (4, 1), flash="auto")
    # Each model with each cache, slots by turns; with several ranks, some of them.
    short = [c for i, c in enumerate(every) if i % 3 == i // 3 % 3]
    cases = (every if FULL else short) + [mixed]
    decode(client, cases + [auto], "exact", plugin=client.out / "exact.so")
    # How far logits are from the reference's where attention is ggml's, and where it is the reference's but for the last bit. A
    # quantised cache makes much of little: a key or value that a bit moves over the border between two values of its block is
    # a step of that block away, and stays there for all steps that follow. So with these caches the plugin is held to
    # ggml's own distance, and its attentions, each by itself, to float64.
    far_ggml, far_bit = {}, {}
    found = decode(client, cases, "ggml", "exact")
    if found is None or decode(client, cases, "bit", "exact", plugin=client.out / "exact.so", EXACT_LAST_BIT="1") is None:
        return
    for case in cases:
        far_ggml[case], _, _ = distance(case, client.out, "ggml")
        far_bit[case], _, _ = distance(case, client.out, "bit")
        if not far_ggml[case] <= max(NEAR_GGML[case.cache], NEAR_GGML[case.cache_v]):
            fail(f"{case.name}: logits of ggml's own attention are {far_ggml[case]:.1e} from those with float64 attention")

    def by_cache(far):
        worst = {cache: max(far[case] for case in cases if case.cache == case.cache_v == cache) for cache in CACHES}
        return ", ".join(f"{cache} {w:.1e}" for cache, w in worst.items())

    print(f"  logits with ggml's own attention from those with float64: {by_cache(far_ggml)}")
    print(f"  logits with float64 but for the last bit: {by_cache(far_bit)}")
    print(f"  ggml's attentions from float64: {by_cache({case: f['far'] for case, f in zip(cases, found)})}")

    ways = [("openmp", "honest"), ("openmp", "inline"), ("hook", "hook")]
    if FULL:
        ways += [("pool", "honest"), ("pool", "inline")]
    for (build, mode), ranks in itertools.product(ways, (1, 2, 3, 4)):
        some = cases if FULL or (ranks == 1 and mode == "honest") else cases[ranks::5 if ranks == 1 else 7]
        if mode != "honest" and ranks == 1:
            some = some + [auto]  # honest mode is turned off by -fa auto, as README.md says
        began = time.monotonic()
        who = f"{build} {mode} {ranks}"
        counted = decode(client, some, who, "exact", build=build, plugin=client.plugin, **client.mode(mode, ranks))
        if counted is None:
            continue
        worst, farthest, ties = 0.0, 0.0, 0
        for case, counts in zip(some, counted):
            on_threads = case.steps() if whose_threads(build, mode) == "ggml" and ranks <= THREADS else 0
            wanted = {"honest": 0, "inline": 0, "hook": 0, "failed": 0, mode: case.steps(), "threads": on_threads}
            if any(counts.get(name) != n for name, n in wanted.items()):
                fail(f"{case.name}, {who}: counts {counts}, wanted {wanted}")
                continue
            far, flips, near_ties = distance(case, client.out, who)
            ties += near_ties
            worst = max(worst, far)
            farthest = max(farthest, counts["far"])
            if not counts["far"] <= EXACT:
                fail(f"{case.name}, {who}: an attention is {counts['far']:.1e} from float64 (wanted {EXACT:.0e})")
            near = NEAR if case.cache == "f16" or case.cache == "bf16" else max(NEAR, far_ggml[case])
            if not far <= near or flips:
                fail(f"{case.name}, {who}: logits are {far:.1e} from the reference's (wanted {near:.0e}), {flips} other tokens")
        print(f"  {who:16} {len(some):3} cases of {STEPS} tokens, attentions within {farthest:.1e}, logits within {worst:.1e}, "
              f"{ties} ties fell otherwise ({time.monotonic() - began:.1f} s)", flush=True)


def test_together(client):
    """Contexts that compute at the same time in one process get the logits that each gets alone."""
    cases = [Decoding("llama", "f16", (1, 1)), Decoding("llama", "q8_0", (4, 1)), Decoding("sinks", "f16", (4, 0))]
    decode(client, cases, "exact", plugin=client.out / "exact.so")
    # The pool's threads spin for each other, whatever else wants the cores.
    for build, mode in (("openmp", "honest"), ("openmp", "inline"), ("hook", "hook"), *([("pool", "inline")] if FULL else [])):
        options = dict(build=build, plugin=client.plugin, **client.mode(mode, 1))
        decode(client, cases, "alone", "exact", **options)
        counted = decode(client, cases, "together", "exact", at_once=len(cases), **options)
        if counted is None:
            continue
        steps = sum(case.steps() for case in cases)
        if counted[0][mode] != steps or counted[0]["failed"]:
            fail(f"contexts at the same time, {build} {mode}: counts {counted[0]}, wanted {steps} {mode}")
        for case in cases:
            if not (case.logits(client.out, "alone") == case.logits(client.out, "together")).all():
                fail(f"{case.name}, {build} {mode}: other logits where other contexts compute at the same time")
    print("  three contexts at the same time: the logits of each alone")


def test_visible(client):
    """Of a cache that four sequences share, and of one that is longer than what it holds, a step reads what its rows see."""
    for case, most in ((Decoding("llama", "f16", (4, 1)), 26), (Decoding("llama", "f16", (1, 1)), 95)):
        result = client.run("decode", text=case.line(client.out, "visible") + "\n", plugin=client.plugin)
        found = re.search(r", (\d+) % of the cache's keys visible", result.stderr)
        if result.returncode or not found or not int(found[1]) <= most:
            fail(f"{case.name}: wanted at most {most} % of the keys to be read, found {found and found[1]}: {result.stderr[-500:]}")
    print("  a step reads the keys that its rows see")


def test_killed(client):
    """A process that is stopped in the middle of decoding ends at once and leaves nothing behind."""
    env = dict(os.environ, OMP_WAIT_POLICY="passive", LD_LIBRARY_PATH=str(client.out / "openmp"), GGML_BACKEND_PATH=client.plugin,
               TREEATTN_GGML_RANKS="2")
    shared = set(os.listdir("/dev/shm"))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        case = Decoding("llama", "f16", (1, 1))
        # A shell starts what runs in the background with SIGINT ignored, and that is inherited.
        child = subprocess.Popen([client.out / "decode"], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL, text=True,
                                 preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        child.stdin.write((case.line(client.out, "killed", None) + "\n") * 100)
        child.stdin.flush()
        if not child.stdout.readline():
            fail("decoding that was to be stopped ended by itself")
        child.send_signal(number)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            fail(f"{number.name}: the process still runs after 30 s")
            continue
        if child.returncode != -number:
            fail(f"{number.name}: the process ended with {child.returncode}")
    left = set(os.listdir("/dev/shm")) - shared
    if any("treeattn" in name for name in left):
        fail(f"left in /dev/shm: {sorted(left)}")
    print("  stopped by SIGINT, SIGTERM and SIGKILL")


def test_grid(client):
    cases = 4000 if FULL else 240
    # Build, mode, ranks, threads.
    runs = [("openmp", "honest", 1, 2), ("pool", "inline", 1, 2), ("pool", "honest", 3, 2), ("hook", "hook", 2, 3)]
    if FULL:
        ways = [*itertools.product(("openmp", "pool"), ("honest", "inline")), ("hook", "hook")]
        runs = [(*way, ranks, 2 if ranks < 4 else 5) for way, ranks in itertools.product(ways, (1, 2, 3, 4))]
    for build, mode, ranks, threads in runs:
        began = time.monotonic()
        # The first run sees all cases, the others a part of them.
        first = (build, mode, ranks, threads) == runs[0]
        count = cases if first or FULL else cases // 3
        result = client.run("grid", count, threads, mode, whose_threads(build, mode), build=build, plugin=client.plugin,
                            timeout=3000, **client.mode(mode, ranks))
        lines = result.stdout.splitlines()
        if result.returncode:
            print(result.stdout)
            fail(f"grid, {build} {mode}, {ranks} ranks: ended with {result.returncode}: {result.stderr.strip()[-2000:]}")
        elif first:
            print("\n".join(lines[:-1]))
        print(f"  {build} {mode}, {ranks} ranks, {threads} threads:{lines[-1] if lines else ''} ({time.monotonic() - began:.1f} s)", flush=True)


def test_hosts(client):
    """Versions of ggml that the plugin knows, does not know, and that lack something."""
    folder = client.out / "hosts"

    def host(what, expected, said=None, program="host", mode=(), **environment):
        result = client.run(folder / program, client.plugin, *mode, timeout=60, **environment)
        lines = [line for line in result.stderr.splitlines() if line]
        if result.returncode or not result.stdout.startswith(expected):
            fail(f"{what}: said {result.stdout.strip()!r}, ended with {result.returncode}: {result.stderr.strip()}")
        elif expected == "taken" and said and said not in lines[0]:
            fail(f"{what}: wanted a first line that names {said!r}, found {lines}")
        elif expected == "refused" and (len(lines) != 1 or not lines[0].startswith("treeattn: ") or said not in lines[0]):
            fail(f"{what}: wanted one line that names {said!r}, found {lines}")

    known = [("0.9.1", 69, 84, 80, 2), ("0.9.4", 69, 84, 80, 2), ("0.9.11", 73, 90, 80, 2), ("0.10.0", 73, 90, 96, 2),
             ("0.15.3", 74, 94, 96, 2), ("0.26.0", 74, 95, 96, 3)]
    for version, flash, custom, offset, api in known:
        env = dict(HOST_VERSION=version, HOST_FLASH=str(flash), HOST_CUSTOM=str(custom), HOST_OFFSET=str(offset), HOST_API=str(api))
        host(f"ggml {version}", "taken", **env)
        host(f"ggml {version} in place", "taken", mode=("inline",), TREEATTN_GGML="inline", **env)
        host(f"ggml {version}, three ranks", "taken", TREEATTN_GGML_RANKS="3", **env)
    host("a host that asks on each of its threads", "taken", mode=("attend",))
    host("a host that asks, of three ranks", "taken", mode=("attend",), TREEATTN_GGML_RANKS="3")
    host("a host that asks, of four ranks for three threads", "taken", mode=("attend",), TREEATTN_GGML_RANKS="4")
    # A machine of two nodes, as the library's tests have it: a rank each.
    nodes = client.out / "two-nodes" / "devices" / "system" / "node"
    cpus = sorted(os.sched_getaffinity(0))
    for node, cpu in enumerate((cpus[0], cpus[-1])):
        (nodes / f"node{node}").mkdir(parents=True, exist_ok=True)
        (nodes / f"node{node}" / "cpulist").write_text(f"{cpu}\n")
    (nodes / "online").write_text("0-1\n")
    two_nodes = str(client.out / "two-nodes")
    host("two nodes", "taken", "2 ranks", TREEATTN_SYSFS=two_nodes)
    host("two nodes, three ranks", "taken", "3 ranks", TREEATTN_SYSFS=two_nodes, TREEATTN_GGML_RANKS="3")
    host("two nodes, a host that asks", "taken", mode=("attend",), TREEATTN_SYSFS=two_nodes)
    unknown = ["0.9.0", "0.8.4", "0.27.0", "1.0.0", "0", "", "nightly"]
    for version in unknown:
        host(f"ggml {version!r}", "refused", version, HOST_VERSION=version)
    host("a newer ggml that is taken for the newest known", "taken", HOST_VERSION="0.99.0", TREEATTN_GGML_ANY_VERSION="1")
    host("an older api_version", "refused", "1", HOST_API="1")
    host("a newer api_version", "refused", "9", HOST_API="9")
    host("no CPU backend", "refused", "CPU", HOST_CPU="0")
    host("another type 1", "refused", "bf32", HOST_F16="bf32")
    host("no FLASH_ATTN_EXT", "refused", "FLASH_ATTN_EXT", HOST_FLASH="2000")
    host("no CUSTOM", "refused", "CUSTOM", HOST_CUSTOM="200")

    symbols = subprocess.run(["nm", "-D", "--defined-only", folder / "host"], stdout=subprocess.PIPE, text=True, check=True).stdout
    functions = sorted(set(re.findall(r" T (ggml_\w+)", symbols)))
    # ggml_version first: without it nothing is known of the host.
    functions.remove("ggml_version")
    chosen = ["ggml_version", *(functions if FULL else functions[::9])]
    for function in chosen:
        program = f"without_{function}"
        subprocess.run(["cc", "-w", "-fvisibility=hidden", f"-D{function}=absent_{function}", "-rdynamic", HERE / "stand_in.c",
                        folder / "host.o", "-o", folder / program, "-ldl", "-lstdc++", "-lm"], check=True)
        host(f"no {function}", "refused", function, program=program)
    # What a host that is no ggml at all sees: nothing but NULL.
    print(f"  {3 * len(known)} of known versions, {len(unknown) + 6} refused, {len(chosen)} with a function missing")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--plugin", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", default="", help="names of tests, with commas")
    options = parser.parse_args()
    client = Client(options.out, options.plugin)
    if not Path(client.plugin).exists():
        sys.exit(f"no plugin at {client.plugin}")
    (client.out / "logits").mkdir(exist_ok=True)
    tests = {
        "hosts": lambda: test_hosts(client),
        "grid": lambda: test_grid(client),
        "decoding": lambda: test_decoding(client),
        "together": lambda: test_together(client),
        "visible": lambda: test_visible(client),
        "killed": lambda: test_killed(client),
    }
    for name, test in tests.items():
        if not options.only or name in options.only.split(","):
            began = time.monotonic()
            print(f"{name}:", flush=True)
            test()
            print(f"  ({time.monotonic() - began:.1f} s)", flush=True)
    print(f"{len(failures)} failed" if failures else "all passed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
