#!/usr/bin/env bash
# Makes a folder of everything that the tests on a GPU need, for a machine without Rust and without this tree:
#
#   tests/gpu/pack.sh FOLDER [ARCH]      ARCH: 90a (default), 80, ...; the kernels are compiled for it alone
#
# Copy the folder there and run FOLDER/run.sh, which says what it can run. Needs nvcc, found as build.rs finds it, here;
# there, an NVIDIA driver and glibc as new as this machine's. What was in FOLDER is removed. With TREEATTN_CUDA_DELAYS=20000
# the kernels hold back at random points of an exchange, up to 20 us: run the tests of ranks in such a folder as well.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -z "$(ls -A "$folder")" ] || [ -e "$folder/run.sh" ] || { echo "$folder: found other things in it"; exit 2; }
export TREEATTN_CUDA=required TREEATTN_CUDA_ARCHS=${2:-90a}
# A target folder of its own, so that changing architectures does not rebuild what others use.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target/pack}

# The executable that cargo says it made for a target of this name.
executable() {
    python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == sys.argv[1]: print(message["executable"])' "$1" | tail -n 1
}

cargo build --release
test=$(cargo test --release --test gpu --no-run --message-format=json | executable gpu)
rm -rf "${folder:?}"/*
mkdir -p "$folder/lib" "$folder/examples" "$folder/c"
cp "$test" "$folder/gpu-tests"
cp "$CARGO_TARGET_DIR/release/treeattn" "$folder/"
cp "$CARGO_TARGET_DIR/release/libtreeattn.so" "$folder/lib/"
strip "$folder/gpu-tests" "$folder/treeattn"
strip --strip-unneeded "$folder/lib/libtreeattn.so"
soname=$(readelf -d "$folder/lib/libtreeattn.so" | sed -n 's/.*SONAME.*\[\(.*\)\]/\1/p')
mv "$folder/lib/libtreeattn.so" "$folder/lib/$soname"
ln -s "$soname" "$folder/lib/libtreeattn.so"
cp -r tests/data/minilm "$folder/data"
cp tests/gpu/run.sh "$folder/run.sh"

for source in tests/gpu/c/*.c; do
    ${CC:-cc} -std=c99 -O1 -D_POSIX_C_SOURCE=200809L -Wall -Wextra -pedantic -Werror -Iinclude "$source" \
        -o "$folder/c/$(basename "$source" .c)" -L"$folder/lib" -ltreeattn -ldl -lm
done
gpu_examples="06_cuda_decode 07_multi_gpu 08_nccl_processes"
make -s -C examples-c all ONLY="$gpu_examples"
for name in $gpu_examples; do
    program=examples-c/build/tree/$name
    [ ! -x "$program" ] || cp "$program" "$folder/examples/"
done
[ -n "$(ls -A "$folder/examples")" ] || echo "no examples: make found no CUDA runtime library; set CUDA_HOME or TREEATTN_NVCC"
# The link is for linking; a copy of the folder may not keep it.
rm "$folder/lib/libtreeattn.so"
kib=$(du -sk "$folder" | cut -f 1)
du -ah "$folder" | sort -h | tail -n 12
[ "$kib" -lt $((50 << 10)) ] || { echo "$folder: found $kib KiB, wanted less than 50 MiB"; exit 1; }
