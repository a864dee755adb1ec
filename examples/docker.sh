#!/usr/bin/env bash
# The quickstart in a container, with data, results and the hub's cache on the host. First argument: cpu or gpu.
set -euo pipefail
cache=${HF_HOME:-$HOME/.cache/huggingface}
mounts=(-v "$PWD/data:/app/data" -v "$PWD/out:/app/quickstart-out" -v "$cache:/root/.cache/huggingface")
if [ "${1:-cpu}" = gpu ]; then
    docker build -t privacy-audit .
    docker run --rm --gpus all "${mounts[@]}" privacy-audit
else
    docker build -t privacy-audit-cpu --build-arg BASE=python:3.11-slim .
    docker run --rm "${mounts[@]}" privacy-audit-cpu
fi
