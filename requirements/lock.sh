#!/bin/sh
# Write the locks anew: newest versions that fit the .in files, for every supported system, with hashes.
# Run by a maintainer (`make lock`); users only install what is locked.
set -eu
cd "$(dirname "$0")"
uv=${UV:-uv}
command -v "$uv" >/dev/null || { echo "make lock needs uv: pip install uv, then make lock (or UV=/path/to/uv make lock)" >&2; exit 1; }
all=$(mktemp)
trap 'rm -f "$all"' EXIT
compile() { "$uv" pip compile -q --universal --python-version 3.11 --no-header --no-annotate "$@"; }
[ "${KEEP:-}" = 1 ] && keep="-c versions.tmp" && sed -n 's/^\([a-z0-9-]*==[^ ]*\).*/\1/p' ./*.lock > versions.tmp || keep=""
# One resolution for all, so that the three files agree; then one file for each kind of machine.
compile $keep service.in worker.in dev.in -o "$all"
rm -f versions.tmp
compile --generate-hashes -c "$all" service.in -o service.lock
compile --generate-hashes -c "$all" service.in worker.in -o worker.lock
compile --generate-hashes -c "$all" service.in worker.in dev.in -o dev.lock
