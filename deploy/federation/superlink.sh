#!/bin/sh
# Starts the SuperLink with TLS, registered keys only, and a database: a SuperLink without one forgets who is
# registered when it ends. Run it from the repository, as the user whose registry and runs these are.
#
# CERTIFICATES  folder made by certificates.sh     DATABASE  file (federation.db beside it)
# HOST, PORT    where nodes reach it (0.0.0.0, 8000)
set -eu
: "${CERTIFICATES:?folder made by certificates.sh}"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
PYTHON=${PYTHON:-.venv/bin/python}
PATH=$(dirname "$(realpath -s "$PYTHON")"):$PATH  # Flower starts its own programs by their names
exec "$PYTHON" -m server.superlink --host "${HOST:-0.0.0.0}" --port "${PORT:-8000}" \
    --ssl-ca-certfile "$CERTIFICATES/ca.crt" --ssl-certfile "$CERTIFICATES/server.crt" \
    --ssl-keyfile "$CERTIFICATES/server.key" --enable-supernode-auth \
    --database "${DATABASE:-$CERTIFICATES/federation.db}" --disable-runtime-dependency-installation
