# Prefect's server and worker, and the pipeline: the embedded server's image, and what `soppu[pipeline]` takes beside it.
ARG SERVER=soppu-server:latest

FROM ${SERVER} AS packages
USER 0
COPY uv /uv
COPY wheels /wheels
RUN /uv pip install --no-index --no-deps --no-cache --quiet --python python3 --target /opt/pipeline /wheels/*.whl \
    && HOME=/tmp PYTHONPATH=/opt/packages:/opt/pipeline python3 -c \
        'import asyncpg, docker, flwr.simulation, jwt, limits, prefect.server.api.server, prefect.workers.process, ray, s3fs'

FROM ${SERVER}
USER 0
COPY --from=packages /opt/pipeline /opt/pipeline
COPY --from=packages /opt/compiled /opt/compiled
# the layout that a new named volume takes over, owner included
RUN mkdir -p /soppu/lorax && chown -R 1000:1000 /soppu
ENV PYTHONPATH=/app:/opt/packages:/opt/pipeline PATH=/opt/pipeline/bin:/usr/local/bin:/usr/bin:/bin SOPPU_HOME=/app \
    HF_HUB_CACHE=/soppu/models/hub PREFECT_HOME=/home/soppu/.prefect PREFECT_UI_STATIC_DIRECTORY=/tmp/prefect-ui \
    PREFECT_SERVER_ANALYTICS_ENABLED=false TOKENIZERS_PARALLELISM=false
# Flower packs the apps out of this folder, soppu's own source included; it wins over the server's copy
COPY app /app
# `soppu users` in a shell of the worker reads the registry that the pipeline writes
RUN python3 -m compileall -q /app && ln -s /soppu /app/.soppu \
    && printf '#!/bin/sh\nexec python3 -m soppu.cli "$@"\n' > /opt/pipeline/bin/soppu && chmod +x /opt/pipeline/bin/soppu
WORKDIR /app
USER 1000:1000
EXPOSE 4200
HEALTHCHECK NONE
ENTRYPOINT []
CMD ["deploy/worker.sh"]
ARG VERSION=unknown
LABEL org.opencontainers.image.title=soppu-worker org.opencontainers.image.version=${VERSION}
