#!/usr/bin/env bash
# start.sh            runs a real NDIF on this machine's loopback until Ctrl-C
# start.sh COMMAND    runs NDIF and the command in a network of their own, then stops NDIF
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ -x "$NDIF_LAB/venv/bin/python" ] || { echo "No server is installed in $NDIF_LAB: run $here/install.sh once." >&2; exit 1; }

if [ -z "${NDIF_INSIDE:-}" ]; then
  # A process namespace of their own, so that all parts of the server end with this script.
  namespaces=(--pid --fork --mount-proc --kill-child=KILL)
  [ $# -eq 0 ] || namespaces+=(--net)
  [ "$(id -u)" -eq 0 ] || namespaces+=(--user --map-root-user)
  NDIF_INSIDE=1 exec unshare "${namespaces[@]}" "${BASH_SOURCE[0]}" "$@"
fi
[ $# -eq 0 ] || ip link set lo up

serve() {  # starts the parts of the server, each with its own log
  local log=$NDIF_LAB/log
  mkdir -p "$log" "$NDIF_HOME"
  cd "$NDIF_LAB"
  export PATH=$NDIF_LAB/venv/bin:$PATH PYTHONPATH=$NDIF_LAB/ndif:$here
  redis-server --port 6399 --bind 127.0.0.1 --save "" --appendonly no >"$log/redis.log" 2>&1 &
  # Only what NDIF lets a block's process have, and not this folder.
  (cd / && exec env -i PATH="$PATH" HOME="$HOME" OMP_NUM_THREADS="$OMP_NUM_THREADS" HF_HUB_OFFLINE=1 PYTHONHASHSEED=0 \
    PYTHONPATH="$NDIF_LAB/ndif" python -P "$here/forking.py" "$MECHVLM_FORKS") >"$log/forks.log" 2>&1 &
  moto_server -H 127.0.0.1 -p 9009 >"$log/objects.log" 2>&1 &
  NDIF_SERVICE=ray ray start --head --node-ip-address=127.0.0.1 --port=6395 --ray-client-server-port=10001 \
    --num-cpus=4 --num-gpus=1 --resources='{"head":10,"cuda_memory_bytes":8000000000,"cpu_memory_bytes":8000000000}' \
    --include-dashboard=true --dashboard-host=127.0.0.1 --dashboard-port=8275 --disable-usage-stats \
    --temp-dir="$(mktemp -d)" --object-store-memory=200000000 >"$log/ray.log" 2>&1
  RAY_ADDRESS=127.0.0.1:6395 python -m ndif.services.ray.deployments.controller.controller >"$log/controller.log" 2>&1
  NDIF_SERVICE=api gunicorn --config python:ndif.services.api.gunicorn_conf --bind 127.0.0.1:8009 \
    ndif.services.api.app:app >"$log/api.log" 2>&1 &
  # Two more addresses of the same server. Port 8010 requires API keys, and its database of keys
  # cannot be reached. Port 8011 requires a newer nnsight.
  serve_api() { NDIF_SERVICE=api python -m uvicorn ndif.services.api.app:app --port "$1" >"$log/api-$1.log" 2>&1 & }
  NDIF_POSTGRES_URL=postgresql://127.0.0.1:1/keys serve_api 8010
  NDIF_MIN_NNSIGHT_VERSION=99.0 serve_api 8011
  for _ in $(seq 240); do
    curl -sf --fail-early "$NDIF_HOST/connected" http://127.0.0.1:8010/ping http://127.0.0.1:8011/ping >/dev/null && return
    sleep 0.5
  done
  return 1
}
trap 'echo "The server did not start; see the logs in $NDIF_LAB/log." >&2' ERR
(serve)
trap - ERR
if [ $# -eq 0 ]; then
  echo "NDIF answers at $NDIF_HOST; \`pytest -m ndif\` runs beside it. Ctrl-C ends it."
  trap exit INT TERM
  sleep infinity & wait
fi
"$@"
