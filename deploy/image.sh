#!/usr/bin/env bash
# deploy/image.sh [NAME]: the image of the embedded server, by deploy/Dockerfile; `make image` runs it.
# BASE names the base image; else it is the official python if that can be pulled, else what base-image.sh makes.
# Wheels are gathered here, in the versions of constraints.txt, so the build itself needs no network.
set -euo pipefail
cd "$(dirname "$0")/.."

name=${1:-soppu-server:latest}
python=${VENV:-.venv}/bin/python
context=.soppu/image
official=python:3.11-slim-bookworm

if [ -z "${BASE:-}" ]; then
    BASE=$official
    if ! docker image inspect "$BASE" >/dev/null 2>&1 && ! timeout 300 docker pull --quiet "$BASE" >/dev/null 2>&1; then
        BASE=soppu-base:bookworm
        deploy/base-image.sh "$BASE"
    fi
fi

mkdir -p "$context/wheels"
rm -rf "$context/library"
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$context/library" .
asked=$(cat constraints.txt pyproject.toml | sha256sum)
if [ "$asked" != "$(cat "$context/asked" 2>/dev/null)" ]; then
    rm -rf "$context"/wheels/*
    # torch as `make setup` gets it: the build for the CPU, where pip is told where that is
    "$python" -m pip download --quiet --only-binary :all: --python-version 3.11 --constraint constraints.txt \
        --dest "$context/wheels" --find-links "$context/library" pip 'soppu[serve]' \
        2> >(grep -v 'is ignored: it is neither' >&2)
    rm -f "$context"/wheels/soppu-*.whl
    echo "$asked" >"$context/asked"
fi
cp deploy/Dockerfile "$context/Dockerfile"

# BuildKit is in buildx, or in a command line of before 23; without either it is the builder of old, which is slower
cli=docker
export DOCKER_BUILDKIT=1
if ! docker buildx version >/dev/null 2>&1; then
    old() { [ "$("$1" --version | grep -o '[0-9]*' | head -n 1)" -lt 23 ]; }
    if ! old docker; then
        if [ -x /usr/bin/docker ] && old /usr/bin/docker; then cli=/usr/bin/docker; else DOCKER_BUILDKIT=0; fi
    fi
fi
version=$("$python" -c 'import soppu; print(soppu.__version__)')
"$cli" build --build-arg BASE="$BASE" --build-arg VERSION="$version" --tag "$name" "$context" >"$context/log" 2>&1 ||
    { tail -n 20 "$context/log" >&2; exit 1; }
echo "$name: $(($(docker image inspect --format '{{.Size}}' "$name") / 1000000)) MB on $BASE"
