# grit serve on a CPU, or with --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 --build-arg TORCH_INDEX= on a GPU.
#   docker build -t grit .
#   docker run -p 127.0.0.1:8000:8000 -e GRIT_API_KEY=... -v ./my_run/checkpoint:/model:ro grit --model /model
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 DEBIAN_FRONTEND=noninteractive
# Debian's mirrors keep no old versions to pin
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3 python3-venv && rm -rf /var/lib/apt/lists/*
# python:* has its own python3 first on the path, a CUDA base takes the system's
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /source
COPY . .
# versions are those of the constraints
# hadolint ignore=DL3013
RUN pip install ${TORCH_INDEX:+--index-url $TORCH_INDEX} "torch==$TORCH" \
    && pip install --constraint python_model/support/constraints.txt setuptools wheel ninja cmake \
    && pip install --no-build-isolation --constraint python_model/support/constraints.txt ".[serve]"

FROM ${BASE}
# Triton compiles its launchers with a C compiler and Python's headers
# hadolint ignore=DL3008
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 10001 grit
# by number, so that a host can tell that it is not root
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
# an address that others reach needs GRIT_API_KEY or --api-key-file
ENTRYPOINT ["grit", "serve", "--host", "0.0.0.0", "--port", "8000"]
