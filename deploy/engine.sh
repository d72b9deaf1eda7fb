#!/usr/bin/env bash
# deploy/engine.sh up|down: a docker engine on this machine, where none answers: Debian's docker.io, run by hand.
# Needs root where there is none. `down` ends what `up` started, unless containers run in it; nothing else.
set -euo pipefail

state=/run/soppu-docker
log=/var/log/soppu-docker.log
sbin=/usr/local/sbin:/usr/sbin:/sbin

answers() { curl --silent --fail --max-time 5 --unix-socket /var/run/docker.sock http://docker/_ping >/dev/null 2>&1; }

running() { curl --silent --fail --unix-socket /var/run/docker.sock http://docker/containers/json; }

install() {
    command -v apt-get >/dev/null || { echo "no dockerd here, and no apt-get to install one: install docker" >&2; exit 1; }
    echo "installing docker.io" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get install --quiet --yes --no-install-recommends docker.io iptables >>"$log" 2>&1 ||
        { apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends docker.io iptables; } >>"$log" 2>&1 ||
        { tail -n 5 "$log" >&2; exit 1; }
}

up() {
    if [ -n "${DOCKER_HOST:-}" ] || answers; then echo "up already"; return; fi
    [ "$(id -u)" = 0 ] || { echo "no docker engine answers, and only root can start one" >&2; exit 1; }
    mkdir -p "$state"
    exec 9>"$state/lock"
    flock 9
    if answers; then echo "up already"; return; fi
    export PATH="$PATH:$sbin"
    command -v dockerd >/dev/null || install
    rm -f /var/run/docker.pid
    # a session of its own, so that an interrupt of make does not end it; and without the lock
    setsid dockerd >>"$log" 2>&1 9>&- </dev/null &
    echo $! >"$state/pid"
    for _ in $(seq 300); do
        if answers; then echo "started"; return; fi
        kill -0 "$(cat "$state/pid")" 2>/dev/null || break
        sleep 0.2
    done
    kill "$(cat "$state/pid")" 2>/dev/null || true
    rm -f "$state/pid"
    echo "dockerd did not come up; the end of $log:" >&2
    tail -n 5 "$log" >&2
    exit 1
}

down() {
    if [ ! -e "$state/pid" ]; then echo "not started here"; return; fi
    if answers && [ "$(running)" != "[]" ]; then echo "left up: containers run in it (docker ps)"; return; fi
    pid=$(cat "$state/pid")
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ]; then
        kill "$pid"
        while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
    fi
    rm -f "$state/pid"
    echo "ended"
}

case "${1:-}" in
    up | down) "$1" ;;
    *) echo "usage: $0 up|down" >&2; exit 2 ;;
esac
