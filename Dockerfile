# One image with two roles: `serve` (the API, the default) and `worker`. Targets: cpu (default), cuda.
# BASE: any Debian image with Python 3.11, 3.12 or 3.13 and pip. PIP_INDEX_URL, PIP_EXTRA_INDEX_URL: pip's indexes.
ARG BASE=python:3.11-slim

FROM ${BASE} AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Build the project as a wheel.
FROM base AS wheel
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY deploy/requirements-build.lock ./
RUN python3 -m venv /build && /build/bin/pip install --require-hashes -r requirements-build.lock
COPY pyproject.toml README.md LICENSE ./
COPY models ./models
COPY service ./service
COPY worker ./worker
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

# Install the locked packages, then the wheel; compile what would be compiled at first use.
FROM base AS packages-cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
COPY deploy/requirements-cpu.lock /requirements.lock
RUN python3 -m venv /opt/afterimage \
    && /opt/afterimage/bin/pip install --require-hashes -r /requirements.lock

FROM base AS packages-cuda
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
COPY deploy/requirements-cuda.lock /requirements.lock
RUN python3 -m venv /opt/afterimage \
    && /opt/afterimage/bin/pip install --require-hashes -r /requirements.lock

FROM packages-cpu AS built-cpu
COPY --from=wheel /wheels /wheels
COPY deploy/prepare.sh /prepare.sh
RUN /prepare.sh

FROM packages-cuda AS built-cuda
COPY --from=wheel /wheels /wheels
COPY deploy/prepare.sh /prepare.sh
RUN /prepare.sh

# The image that runs: no compiler, two writable folders.
FROM base AS runtime
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Afterimage" \
      org.opencontainers.image.description="HTTP decoding service for learned-codec bitstreams" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 afterimage \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/afterimage afterimage \
    && install -d -o 10001 -g 10001 /var/cache/afterimage /var/lib/afterimage/weights
ENV PATH=/opt/afterimage/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/afterimage \
    AFTERIMAGE_CACHE_DIR=/var/cache/afterimage \
    AFTERIMAGE_WEIGHTS_DIR=/var/lib/afterimage/weights
COPY deploy/entrypoint.sh /entrypoint.sh
VOLUME ["/var/cache/afterimage", "/var/lib/afterimage/weights"]
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["/entrypoint.sh"]
CMD ["serve", "--host", "0.0.0.0"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["/entrypoint.sh", "healthy"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=built-cuda /opt/afterimage /opt/afterimage

FROM runtime AS cpu
COPY --from=built-cpu /opt/afterimage /opt/afterimage
