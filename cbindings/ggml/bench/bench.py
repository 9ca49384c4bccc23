"""Times the plugin in ggml and libllama beside ggml's own attention and the library alone; the Makefile builds what it needs.

    bench.py --plugin PATH --out FOLDER

Prints Markdown tables of what was measured, then the targets.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

TYPES = ("f16", "bf16", "q8_0", "q4_0")
# Build of ggml, TREEATTN_GGML, and how long the pool's threads spin: 50 is llama-server's default.
WAYS = (("openmp", "device", 50), ("openmp", "inline", 50), ("pool", "inline", 50), ("pool", "device", 0), ("pool", "device", 50))
SHAPE = "32 8 128"

targets = []


def target(name, found, wanted, unit, most=True):
    met = found <= wanted if most else found >= wanted
    targets.append(f"| {name} | {'<=' if most else '>='} {wanted:g} {unit} | {found:.2f} {unit} | {'met' if met else 'MISSED'} |")


class Found(dict):
    """What a line says: of each name the median over the rounds."""

    def __init__(self, line):
        self.rounds = {k: [float(x) for x in v.split(",")] for k, v in re.findall(r"(\w+)=(\S+)", line)}
        super().__init__({k: statistics.median(v) for k, v in self.rounds.items()})

    def over(self, of, by):
        """The median of the ratios, round by round: what comes and goes meets both."""
        return statistics.median(a / b for a, b in zip(self.rounds[of], self.rounds[by]))


class Client:
    def __init__(self, options):
        self.out, self.plugin, self.threads, self.seconds = Path(options.out).resolve(), options.plugin, options.threads, options.seconds

    def run(self, program, *arguments, text, build, **environment):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("TREEATTN", "GGML", "OMP_", "GOMP_"))}
        env.update(LD_LIBRARY_PATH=str(self.out / build), TREEATTN_GGML_LOG="warning", **environment)
        result = subprocess.run([str(self.out / program), *map(str, arguments), str(self.threads), str(self.seconds)], env=env,
                                input=text, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        if result.returncode:
            sys.exit(f"{program} ended with {result.returncode}: {result.stderr.strip()}")
        return [Found(line) for line in result.stdout.splitlines()]

    def attention(self, cases, build, mode, poll):
        text = "".join(f"{SHAPE} {case}\n" for case in cases)
        return self.run("attention", poll, text=text, build=build, GGML_BACKEND_PATH=self.plugin, TREEATTN_GGML=mode)


def name(build, mode, poll):
    return f"OpenMP, {mode}" if build == "openmp" else f"pool, {mode}" + (", --poll 0" if poll == 0 else "")


def bench_attention(client):
    print("\nAn attention of one token, 32,768 keys, microseconds a layer:\n")
    print("| cache | threads of ggml, mode | ggml | plugin | library alone | ggml / plugin | plugin / library |")
    print("|---|---|---|---|---|---|---|")
    for kind in TYPES:
        for way in WAYS if kind in ("f16", "q8_0") else WAYS[:1]:
            found, = client.attention([f"{kind} 32768 2 1 0"], *way)
            faster, over = found.over("ggml", "plugin"), found.over("plugin", "library")
            print(f"| {kind} | {name(*way)} | {found['ggml']:.0f} | {found['plugin']:.0f} | {found['library']:.0f} | "
                  f"{faster:.1f} x | {over:.2f} x |", flush=True)
            target(f"{kind}, {name(*way)}: plugin over library", over, 1.15, "x")
            if kind in ("f16", "q8_0") and way == WAYS[0]:
                target(f"{kind}: ggml over plugin", faster, 4 if kind == "f16" else 6, "x", most=False)


def bench_added(client):
    print("\nWhat a layer costs beside its attention: 64 keys f16, 64 layers, microseconds a layer:\n")
    print("| threads of ggml, mode | ggml | plugin | library by a team | added |")
    print("|---|---|---|---|---|")
    for way in WAYS:
        found, = client.attention(["f16 64 64 1 0"], *way)
        # The library's own threads sleep between steps where ggml's do not compute: the step by them is what is added to.
        least = found["library" if way[:2] == ("pool", "device") else "team"]
        added = found["plugin"] - least
        print(f"| {name(*way)} | {found['ggml']:.1f} | {found['plugin']:.1f} | {least:.1f} | {added:.1f} |", flush=True)
        if way == WAYS[0]:
            target("device, OpenMP: added to a layer", added, 5, "us")


def bench_slots(client):
    print("\nA cache of 32,768 keys f16 that four slots share, a quarter visible to each, microseconds a layer; the visible keys' "
          "share is of a token that sees all:\n")
    print("| step | threads of ggml, mode | all keys, one token | step | keys' share | over share |")
    print("|---|---|---|---|---|---|")
    cases = (("one slot of four, 64 keys a turn", "1 64", 0.25), ("one slot of four, a key a turn", "1 1", 0.25),
             ("four slots, 64 keys a turn", "4 64", 1.0), ("four slots, a key a turn", "4 1", 1.0))
    for way in WAYS[:2]:
        found = client.attention(["f16 32768 2 1 0", *(f"f16 32768 2 {case}" for _, case, _ in cases)], *way)
        for (text, _, share), step in zip(cases, found[1:]):
            over = step.over("plugin", "library") / share
            print(f"| {text} | {name(*way)} | {step['library']:.0f} | {step['plugin']:.0f} | {share:g} | {over:.2f} x |",
                  flush=True)
            target(f"{text}, {name(*way)}", over, 1.3, "x")


def bench_tokens(client):
    print("\nTokens a second of libllama, OpenMP, a model in which attention is most of the work (4 layers):\n")
    print("| cache | depth | without | with | ratio |")
    print("|---|---|---|---|---|")
    for kind in ("f16", "q8_0"):
        for depth in (4096, 32768, 131072):
            found, = client.run("tokens", client.out / "models" / "bench.gguf", client.plugin, text=f"{kind} {depth}\n", build="openmp")
            print(f"| {kind} | {depth} | {found['without']:.2f} | {found['with']:.2f} | {found.over('with', 'without'):.1f} x |",
                  flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--plugin", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.0, help="of everything that takes turns")
    parser.add_argument("--only", default="", help="attention, added, slots, tokens; with commas")
    options = parser.parse_args()
    options.plugin = str(Path(options.plugin).resolve())
    client = Client(options)
    parts = {"attention": bench_attention, "added": bench_added, "slots": bench_slots, "tokens": bench_tokens}
    for part, bench in parts.items():
        if not options.only or part in options.only.split(","):
            bench(client)
    if targets:
        print("\n| target | wanted | found | |\n|---|---|---|---|")
        print("\n".join(targets))


if __name__ == "__main__":
    main()
