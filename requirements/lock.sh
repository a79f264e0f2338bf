#!/bin/sh
# Write the locks anew, for every supported system, with hashes. `make lock` keeps what is pinned and fits the .in files;
# `UPGRADE=1 make lock` takes the newest versions. For maintainers: users only install what is locked.
set -eu
cd "$(dirname "$0")"
uv=${UV:-uv}
command -v "$uv" >/dev/null || { echo "make lock needs uv: pip install uv (or UV=/path/to/uv make lock)" >&2; exit 1; }
compile() { "$uv" pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate "$@"; }
# dev.lock holds everything; the smaller ones take their versions from it, so that the three agree.
compile ${UPGRADE:+--upgrade} service.in worker.in dev.in -o dev.lock
compile -c dev.lock service.in worker.in -o worker.lock
compile -c dev.lock service.in -o service.lock
