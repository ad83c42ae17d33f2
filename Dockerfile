# Any image with Python 3.11 or later, venv and pip will do: --build-arg BASE_IMAGE=…
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
# default: PyPI's torch, with CUDA 13 (gigabytes; NVIDIA's driver must be 580 or later). Others are
# builds of PyTorch's own index: cpu (needs no GPU, finds none), cu126 (older drivers), ….
ARG TORCH=default
# A mirror of https://download.pytorch.org/whl/${TORCH}.
ARG TORCH_INDEX=""
# More requirements, with spaces between: "bitsandbytes>=0.48,<1" for --quantization int8,
# "opentelemetry-exporter-otlp-proto-http>=1.45,<2" for traces.
ARG EXTRAS=""
WORKDIR /src
# The environment gets no pip of its own. Only a changed lock file renews this step.
COPY requirements.lock .
RUN case "${TORCH}" in \
        default) ;; \
        cpu|cu[0-9]*) \
            set -- --extra-index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/${TORCH}}" ;; \
        *) echo "TORCH=${TORCH}: must be default, cpu or a CUDA build such as cu126" >&2; exit 2 ;; \
    esac \
    && python3 -m venv --without-pip /opt/venv \
    && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir "$@" \
        -r requirements.lock ${EXTRAS}
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY model model
COPY server server
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="nv-embed-server" \
      org.opencontainers.image.description="An OpenAI-compatible embedding server for NV-Embed; holds a small model, not NVIDIA's weights" \
      org.opencontainers.image.licenses="Apache-2.0"
# Debian packages to add. Nothing needs any, and a compiler is what an intruder would like to find;
# Triton's kernels, which are off by default, compile their launcher: "gcc libc6-dev".
ARG PACKAGES=""
# Their versions are the caller's to choose: PACKAGES="gcc=…".
# hadolint ignore=DL3008
RUN [ -z "${PACKAGES}" ] || { apt-get update \
    && apt-get install -y --no-install-recommends ${PACKAGES} && rm -rf /var/lib/apt/lists/*; }
# /cache holds downloaded weights, and what is compiled: Docker mounts a tmpfs such as /tmp noexec.
# The two are all that is ever written to.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp nv-embed \
    && install -d -o nv-embed -g nv-embed /cache
COPY --from=build /opt/venv /opt/venv
# A layer of its own: a release that changes only our code adds 33 MB, 29 of them the small model.
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --no-index --no-deps /dist/*.whl
COPY docker/healthcheck.py LICENSE NOTICE /opt/nv-embed/
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HF_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    NV_EMBED_HOST=0.0.0.0
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /tmp
VOLUME /cache
EXPOSE 8000
# Ready means: the weights are loaded. Failures count only once the start period is over.
HEALTHCHECK --interval=10s --timeout=5s --start-period=1h --retries=3 \
    CMD ["python", "-I", "/opt/nv-embed/healthcheck.py"]
ENTRYPOINT ["nv-embed"]
CMD ["serve"]
