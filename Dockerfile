# GPU: docker build -t privacy-audit . && docker run --rm --gpus all -v "$PWD/data:/app/data" \
#          -v "$PWD/out:/app/quickstart-out" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" privacy-audit
# CPU: docker build -t privacy-audit-cpu --build-arg BASE=python:3.11-slim . && docker run --rm -v "$PWD/data:/app/data" \
#          -v "$PWD/out:/app/quickstart-out" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" privacy-audit-cpu
# Mounted: your data files, the results, the hub's cache. Another command goes at the end: … privacy-audit python audit.py …
# examples/docker.sh does the same.
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${BASE}
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
WORKDIR /app
COPY requirements.txt .
RUN grep -v '^-e' requirements.txt > pins.txt && pip install --no-cache-dir --requirement pins.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .
CMD ["python", "quickstart.py"]
