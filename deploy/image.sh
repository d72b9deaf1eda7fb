#!/usr/bin/env bash
# deploy/image.sh [NAME [server|evaluator|worker]]: an image out of this tree. `make image` runs it.
#   server      the embedded server, by deploy/Dockerfile (soppu-server:latest)
#   evaluator   `soppu` with what scores text, by the same file (soppu-evaluator:latest)
#   worker      Prefect's server, worker, the pipeline and the gateway, by deploy/worker.Dockerfile (soppu-worker:latest) on top of the
#               server's image: SERVER names one that is there, else soppu-server:latest is built first
# BASE names the base image; else it is the official python if that can be pulled, else what base-image.sh makes.
# Wheels are gathered here, in the versions of constraints.txt, so the build itself needs no network.
set -euo pipefail
cd "$(dirname "$0")/.."

kind=${2:-server}
case "$kind" in
    server | evaluator | worker) ;;
    *) echo "$kind: allowed are server, evaluator and worker" >&2; exit 2 ;;
esac
name=${1:-soppu-$kind:latest}
python=${VENV:-.venv}/bin/python
uv=${VENV:-.venv}/bin/uv
context=.soppu/image
official=python:3.11-slim-bookworm

# gather FOLDER EXTRAS [PACKAGE...]: the wheels of soppu[EXTRAS] and of packages, once for each state of what says which
gather() {
    local asked
    asked=$({ cat constraints.txt pyproject.toml; echo "${@:2}"; } | sha256sum)
    if [ "$asked" = "$(cat "$1/asked" 2>/dev/null)" ]; then return; fi
    rm -rf "$1/wheels"
    mkdir -p "$1/wheels"
    # torch as `make setup` gets it: the build for the CPU, where pip is told where that is
    "$python" -m pip download --quiet --only-binary :all: --python-version 3.11 --constraint constraints.txt \
        --dest "$1/wheels" --find-links "$context/library" --find-links "$context/wheels" "soppu[$2]" "${@:3}" \
        2> >(grep -v 'is ignored: it is neither' >&2)
    rm -f "$1"/wheels/soppu-*.whl
    echo "$asked" >"$1/asked"
}

# build FOLDER ARGUMENT [TARGET]: a folder's Dockerfile, as far as its target
build() {
    # BuildKit is in buildx, or in a command line of before 23; without either it is the builder of old, which is slower
    local cli=docker version
    export DOCKER_BUILDKIT=1
    if ! docker buildx version >/dev/null 2>&1; then
        old() { [ "$("$1" --version | grep -o '[0-9]*' | head -n 1)" -lt 23 ]; }
        if ! old docker; then
            if [ -x /usr/bin/docker ] && old /usr/bin/docker; then cli=/usr/bin/docker; else DOCKER_BUILDKIT=0; fi
        fi
    fi
    version=$("$python" -c 'import soppu; print(soppu.__version__)')
    cp "$uv" "$1/uv"   # runs in the build, without a library of its own
    "$cli" build --build-arg "$2" --build-arg VERSION="$version" ${3:+--target "$3"} --tag "$name" "$1" >"$1/log" 2>&1 ||
        { tail -n 20 "$1/log" >&2; exit 1; }
    echo "$name: $(($(docker image inspect --format '{{.Size}}' "$name") / 1000000)) MB on ${2#*=}"
}

# library FOLDER: the wheel of this tree, alone in it
library() {
    rm -rf "$1"
    "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$1" .
}

if [ "$kind" = worker ]; then
    server=${SERVER:-soppu-server:latest}
    [ -n "${SERVER:-}" ] || deploy/image.sh "$server" server
    library "$context/library"
    # async-timeout: redis, which Prefect takes, needs it on Debian's Python; pip asks about its own. s3fs: buckets
    gather "$context-pipeline" serve,gateway,pipeline async-timeout s3fs
    rm -rf "$context-worker"
    mkdir -p "$context-worker/wheels" "$context-worker/app"
    there=$(docker run --rm --entrypoint ls "$server" /opt/packages)
    for wheel in "$context-pipeline"/wheels/*; do   # but what the server's image has
        IFS=- read -r package release _ <<<"${wheel##*/}"
        grep -qxF "$package-$release.dist-info" <<<"$there" || cp --link "$wheel" "$context-worker/wheels"
    done
    cp -r soppu clients server tasks flows configs deploy pyproject.toml prefect.toml README.md LICENSE "$context-worker/app"
    find "$context-worker/app" -name __pycache__ -prune -exec rm -rf {} +
    cp deploy/worker.Dockerfile "$context-worker/Dockerfile"
    build "$context-worker" "SERVER=$server"
    exit
fi

if [ -z "${BASE:-}" ]; then
    BASE=$official
    if ! docker image inspect "$BASE" >/dev/null 2>&1 && ! timeout 300 docker pull --quiet "$BASE" >/dev/null 2>&1; then
        BASE=soppu-base:bookworm
        deploy/base-image.sh "$BASE"
    fi
fi
library "$context/library"
gather "$context" serve
if [ "$kind" = evaluator ]; then
    gather "$context-scores" evaluate,humaneval
    rm -rf "$context/evaluator"
    mkdir "$context/evaluator"
    for wheel in "$context-scores"/wheels/*; do   # but what the server has
        [ -e "$context/wheels/${wheel##*/}" ] || cp --link "$wheel" "$context/evaluator"
    done
fi
cp deploy/Dockerfile "$context/Dockerfile"
build "$context" "BASE=$BASE" "$kind"
