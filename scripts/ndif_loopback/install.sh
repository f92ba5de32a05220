#!/usr/bin/env bash
# Installs the server once into $NDIF_LAB (about 2 GB), in its own environment without mechvlm.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
mkdir -p "$NDIF_LAB"
python3 -m venv "$NDIF_LAB/venv"
pip=$NDIF_LAB/venv/bin/pip
"$pip" install -q torch==2.13.0
"$pip" install -q nnsight==0.8.1 transformers==5.23.0 "ray[default]==2.60.0" accelerate peft einops pillow \
  fastapi "uvicorn[standard]" gunicorn python-multipart redis boto3 click python-dotenv "moto[server]"
# ndif 0.1.2 requires Python 3.12 but runs on 3.11.
"$pip" install -q --no-deps --ignore-requires-python --python-version 3.12 --only-binary=:all: --upgrade \
  --target "$NDIF_LAB/ndif" ndif==0.1.2
# The process that runs a block has 30 s to start, and a busy machine takes longer. The server then
# loses it, and the request that waits for it waits for ever.
host=$NDIF_LAB/ndif/ndif/services/ray/sandbox/host.py
sed -i 's/^    timeout: float = 30.0,$/    timeout: float = 600.0,/' "$host"
grep -q '^    timeout: float = 600.0,$' "$host"
