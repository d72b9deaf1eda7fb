#!/bin/sh
# A worker in a container: the pool and the deployments first, then runs. Its server is at PREFECT_API_URL.
set -eu
cd "$(dirname "$0")/.."
prefect --no-prompt work-pool create soppu --type process --overwrite
prefect --no-prompt deploy --all --prefect-file deploy/prefect-container.yaml
exec prefect worker start --pool soppu --type process --name "$(uname -n)" --with-healthcheck
