#!/usr/bin/env bash
# Builds the emulator:
#
#   build.sh FOLDER     libcuda.so and libcuda.so.1 in FOLDER; what is up to date stays
#
# CXX is the compiler (default: g++, 12 or later). JOBS compile at once (default: all cores). Exit status 77: not on this
# machine.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kernels=$here/../../kernels
[ $# -eq 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cxx=${CXX:-g++}
[ "$(uname -sm)" = "Linux x86_64" ] || { echo "the emulator is written for Linux on x86-64" >&2; exit 77; }
[ "$("$cxx" -dumpversion 2>/dev/null | cut -d . -f 1)" -ge 12 ] 2>/dev/null || { echo "found no $cxx 12 or later" >&2; exit 77; }
flags=(-std=c++20 -O2 -g1 -fPIC -fvisibility=hidden -march=native -fno-strict-aliasing -fno-math-errno -w)

# One build at a time: tests run side by side.
exec 9>"$folder/lock"
flock 9

# What was compiled from the same text is kept: of_kernels for the kernels' objects, of_all for the library.
sum() { cat "$@" "$here/build.sh" <("$cxx" --version) <(grep -m 1 ^flags /proc/cpuinfo) | sha256sum; }
of_kernels=$(sum "$here"/engine.h "$here"/device/* "$kernels"/*.cu "$kernels"/*.cuh)
of_all=$of_kernels$(sum "$here"/*.h "$here"/*.cpp)
if [ "$(cat "$folder/all.stamp" 2>/dev/null)" = "$of_all" ]; then exit 0; fi
rm -f "$folder/all.stamp"
if [ "$(cat "$folder/kernels.stamp" 2>/dev/null)" != "$of_kernels" ]; then rm -f "$folder"/*.stamp "$folder"/*.o; fi

# The kernels' folder as the host's compiler gets it: instructions are the emulator's, shared variables are found at
# run time.
rm -rf "$folder/source"
mkdir -p "$folder/source/kernels"
cp "$here"/engine.h "$folder/source"
cp -r "$here/device" "$folder/source/device"
for path in "$kernels"/*.cu "$kernels"/*.cuh; do
    name=$(basename "$path")
    [ -e "$here/device/$name" ] && continue
    sed -E \
        -e 's/extern __shared__ (__align__\([0-9]+\) )?([A-Za-z_0-9:]+) ([A-Za-z_0-9]+)\[\];/\2* const \3 = reinterpret_cast<\2*>(emulator::dynamic_shared());/' \
        -e 's/__shared__ ((__align__|alignas)\([0-9]+\) )?([A-Za-z_0-9:<>]+) ([A-Za-z_0-9]+)((\[[^]]*\])*);/using \4_type = \3\5; static const char \4_tag = 0; \4_type\& \4 = *static_cast<\4_type*>(emulator::static_shared(\&\4_tag, sizeof(\4_type), 128));/' \
        "$path" >"$folder/source/kernels/$name"
done

# compile SOURCE OBJECT FLAGS...: leaves no object where it fails.
compile() {
    local source=$1 object=$2
    shift 2
    "$cxx" "${flags[@]}" "$@" -c "$source" -o "$object" || { rm -f "$object"; return 1; }
}

# preprocess FILE: as one line, with the words by which kernels and constants are found.
preprocess() {
    cd "$folder/source"  # where quoted names are looked for first
    printf '#define EMULATOR_LIST\n#include "device/builtins.h"\n#undef __device__\n#include "kernels/%s"\n' "$1" |
        "$cxx" -std=c++20 -E -P -w -x c++ "${include[@]}" - | tr '\n' ' '
}
include=(-I"$folder/source" -I"$folder/source/device" -I"$folder/source/kernels")
# found PATTERN TEXT: the names that come last in what matches, one a line.
found() { grep -oE "$1" <<<"$2" | grep -oE '[A-Za-z_0-9]+ *[(=]$' | tr -d ' (=' || true; }

# One part of a kernel source, with its kernels and constants registered: of the lines that are one macro each, which
# make kernels, it has every PARTS-th.
kernel() {
    local stem=$1 part=$2 text name
    awk -v part="$part" -v parts="$parts" '/^[A-Z_0-9]+\(.*\)$/ { if (n++ % parts != part) next } { print }' \
        "$folder/source/kernels/$stem.cu" >"$folder/source/kernels/$stem.$part.cu"
    text=$(preprocess "$stem.$part.cu")
    {
        printf '#include "device/builtins.h"\n#include "kernels/%s.%s.cu"\n' "$stem" "$part"
        for name in $(found '__global__ +void +[A-Za-z_0-9]+ *\(' "$text"); do echo "EMULATOR_KERNEL($name)"; done
        for name in $(found '"C" +__device__ +const +[A-Za-z_0-9:]+ +[A-Za-z_0-9]+ *=' "$text"); do
            echo "EMULATOR_CONSTANT($name)"
        done
    } >"$folder/source/$stem.$part.cpp"
    compile "$folder/source/$stem.$part.cpp" "$folder/$stem.$part.o" "${include[@]}" '-DTREEATTN_DELAYS=emulator::delays()'
}

rm -f "$folder"/emulator_*.o
jobs=${JOBS:-$(nproc)}
wanted=()
# begin STEM COMMAND...: in the background, as soon as there is room; it makes STEM.o.
begin() {
    wanted+=("$1")
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
    "${@:2}" &
}
# The longest first.
for name in $(cd "$folder/source/kernels" && ls -S ./*.cu); do
    name=$(basename "$name" .cu)
    parts=1
    [ "$(grep -cE '^[A-Z_0-9]+\(.*\)$' "$kernels/$name.cu")" -lt 4 ] || parts=4
    for ((part = 0; part < parts; part++)); do
        [ -e "$folder/$name.$part.o" ] || begin "$name.$part" kernel "$name" "$part"
    done
done
for path in "$here"/*.cpp; do
    name=emulator_$(basename "$path" .cpp)
    begin "$name" compile "$path" "$folder/$name.o" -O3 -I"$here"
done
wait
for name in "${wanted[@]}"; do
    [ -e "$folder/$name.o" ] || { echo "the emulator was not built: $name" >&2; exit 1; }
done
printf '%s' "$of_kernels" >"$folder/kernels.stamp"
"$cxx" -shared -o "$folder/libcuda.so.1" "$folder"/*.o -Wl,-soname,libcuda.so.1 -Wl,-z,defs -pthread -ldl
ln -sf libcuda.so.1 "$folder/libcuda.so"
printf '%s' "$of_all" >"$folder/all.stamp"
