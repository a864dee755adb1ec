#!/usr/bin/env bash
# The quickstart in a container: examples/docker.sh cpu, or examples/docker.sh gpu.
# Mounted from the host: data/ (your data files and the builders), out/ (results) and the Hugging Face cache.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${HF_HOME:-$HOME/.cache/huggingface}
mkdir -p out "$cache"
mounts=(-v "$PWD/data:/app/data" -v "$PWD/out:/app/quickstart-out" -v "$cache:/root/.cache/huggingface")
if [ "${1:-cpu}" = gpu ]; then
    docker build -t privacy-audit .
    docker run --rm --gpus all "${mounts[@]}" privacy-audit
else
    docker build -t privacy-audit-cpu --build-arg BASE=python:3.11-slim .
    docker run --rm "${mounts[@]}" privacy-audit-cpu
fi
