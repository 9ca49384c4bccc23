#!/usr/bin/env bash
# Installs into a fresh prefix, builds consumers against what was installed (pkg-config and CMake, shared and static),
# moves the tree, uninstalls. The first argument, if given, is where the last installed tree is left.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix=$work/prefix
read -r version soname < <(make -s --no-print-directory -C "$top/cbindings" version)
say() { printf '  %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

# Whether a program needs the shared library, by its soname.
needs() { readelf -d "$1" | grep "NEEDED.*\[$soname\]" >/dev/null; }

make -s -C "$top/cbindings" install PREFIX="$prefix"
for file in lib/libtreeattn.so lib/"$soname" lib/libtreeattn.so."$version" lib/libtreeattn.a include/treeattn.h \
    include/treeattn.hpp lib/pkgconfig/treeattn.pc lib/cmake/treeattn/treeattnConfig.cmake bin/treeattn; do
    [ -s "$prefix/$file" ] || fail "$file was not installed"
done
[ "$(readlink -f "$prefix/lib/libtreeattn.so")" = "$(readlink -f "$prefix/lib/libtreeattn.so.$version")" ] ||
    fail "libtreeattn.so does not lead to libtreeattn.so.$version"
say "installed $version as $soname"

nm -g --defined-only "$prefix/lib/libtreeattn.a" | awk 'NF == 3 {print $3}' | sort >"$work/static-names"
grep '^treeattn_' "$top/cbindings/symbols.txt" | sort | diff - "$work/static-names" ||
    fail "the static library defines other names than symbols.txt"
say "the static library defines the names of symbols.txt and no others"

export PKG_CONFIG_PATH=$prefix/lib/pkgconfig
[ "$(pkg-config --modversion treeattn)" = "$version" ] || fail "pkg-config reports another version"
# shellcheck disable=SC2046
cc -std=c99 -Wall -Wextra -pedantic -Werror "$here/main.c" -o "$work/shared" $(pkg-config --cflags --libs treeattn)
needs "$work/shared" || fail "the pkg-config consumer does not name $soname"
say "pkg-config, shared: $(LD_LIBRARY_PATH=$prefix/lib "$work/shared")"
# shellcheck disable=SC2046
cc -std=c99 "$here/main.c" -o "$work/static" \
    $(pkg-config --static --cflags --libs treeattn | sed 's/-ltreeattn/-l:libtreeattn.a/')
! needs "$work/static" || fail "the static consumer still needs $soname"
say "pkg-config, static: $("$work/static")"

# CMake, from the tree as installed and from where it was moved to.
consumers() {
    cmake -S "$here" -B "$2" -DCMAKE_PREFIX_PATH="$1" -DWANTED="${version%.*}" -DUNWANTED=97.0 >"$2.log" ||
        { cat "$2.log"; fail "cmake could not configure"; }
    cmake --build "$2" >"$2.log" 2>&1 || { cat "$2.log"; fail "cmake could not build"; }
    for program in "$2"/main_c*_*; do
        case $program in
        *_shared) needs "$program" || fail "$program does not name $soname" ;;
        *) ! needs "$program" || fail "$program still needs $soname" ;;
        esac
        say "CMake, $(basename "$program"): $("$program")"
    done
}
consumers "$prefix" "$work/build"
mv "$prefix" "$work/moved"
say "moved:"
consumers "$work/moved" "$work/build-moved"

# A staged install puts nothing outside DESTDIR; uninstall leaves no file.
stage=$work/stage
arch=lib/$(cc -print-multiarch)
make -s -C "$top/cbindings" install PREFIX=/opt/treeattn LIBDIR="/opt/treeattn/$arch" DESTDIR="$stage"
[ ! -e /opt/treeattn/$arch/libtreeattn.a ] || fail "the staged install wrote outside DESTDIR"
[ -e "$stage/opt/treeattn/$arch/$soname" ] || fail "the staged install has no $soname"
! grep -rq "$stage" "$stage/opt/treeattn/$arch/pkgconfig" || fail "the .pc file names DESTDIR"
consumers "$stage/opt/treeattn" "$work/build-stage"
make -s -C "$top/cbindings" uninstall PREFIX=/opt/treeattn LIBDIR="/opt/treeattn/$arch" DESTDIR="$stage"
left=$(find "$stage" -type f -o -type l)
[ -z "$left" ] || fail "uninstall left $left"
say "staged and uninstalled: nothing left"

if [ $# -gt 0 ]; then
    make -s -C "$top/cbindings" install PREFIX="$(realpath -m "$1")"
fi
