#!/bin/sh
# One user's SuperNode. Run it from the repository, as a user of the system who may read DATA and nobody else's.
#
#     supernode.sh once        start it, end when it ends: for systemd and Docker, which start it again
#     supernode.sh sign-off    tell the SuperLink that it has ended; one that was killed could not
#     supernode.sh forever     both, again and again, with longer and longer pauses: where nothing else does
#
# A SuperNode ends when the SuperLink is away for long or does not know its key.
#
# SUPERLINK  host:port      CA    ca.crt of certificates.sh     KEY   private key     NODE  its number, when registered
# USER_ID    whose it is    DATA  the user's text               CACHE folder for base models (.soppu/models)
# STATE      folder for what is the user's own between rounds (.soppu/clients)     DEVICE  auto, cpu, cuda or cuda:N
# MODEL      where the base model is here, if it has no name that every machine knows (a folder)
# PORT       of its own, on 127.0.0.1 (9094); one for each node of a machine
set -u
: "${SUPERLINK:?host:port}" "${CA:?ca.crt}" "${KEY:?private key}" "${NODE:?number}"
# else the caches of oneDNN grow with every new length of a text
export ONEDNN_PRIMITIVE_CACHE_CAPACITY=16 LRU_CACHE_CAPACITY=16
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
PYTHON=${PYTHON:-.venv/bin/python}
PATH=$(dirname "$(realpath -s "$PYTHON")"):$PATH  # Flower starts its own programs by their names

once() {
    : "${USER_ID:?user}" "${DATA:?the text of the user}"
    exec flower-supernode --superlink "$SUPERLINK" --root-certificates "$CA" --auth-supernode-private-key "$KEY" \
        --host 127.0.0.1 --port "${PORT:-9094}" \
        --node-config "user-id=\"$USER_ID\" data-source=\"$DATA\" model-cache=\"${CACHE:-.soppu/models}\" state-dir=\"${STATE:-.soppu/clients}\" device=\"${DEVICE:-auto}\"${MODEL:+ base-model=\"$MODEL\"}"
}

sign_off() {
    "$PYTHON" -m clients.sign_off --superlink "$SUPERLINK" --root-certificates "$CA" \
        --auth-supernode-private-key "$KEY" --node "$NODE" 2>/dev/null
}

forever() {
    pause=1
    trap 'kill "$child" 2>/dev/null; wait "$child"; exit 0' TERM INT
    while :; do
        began=$(date +%s)
        (once) &
        child=$!
        wait "$child"
        sign_off
        [ $(($(date +%s) - began)) -lt 60 ] || pause=1
        sleep "$pause" &
        child=$!
        wait "$child"
        pause=$((pause < 32 ? pause * 2 : 60))
    done
}

case ${1:-} in
    once) once ;;
    sign-off) sign_off ;;
    forever) forever ;;
    *) sed -n '2,6p' "$0" >&2; exit 2 ;;
esac
