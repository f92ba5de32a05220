# Settings that the other scripts source: addresses of the server's parts, and what they run.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export NDIF_LAB=${NDIF_LAB:-$(cd "$here/../.." && pwd)/.ndif}
export NDIF_HOST=http://127.0.0.1:8009  # the tests use this address

# NDIF's own settings.
export NDIF_HOME=$NDIF_LAB/home NDIF_API_PORT=8009 NDIF_API_URL=$NDIF_HOST
export NDIF_REDIS_URL=redis://127.0.0.1:6399 NDIF_OBJECT_STORE_URL=http://127.0.0.1:9009
export NDIF_RAY_ADDRESS=ray://127.0.0.1:10001  # below the ports of Ray's workers
export NDIF_MODEL_IMPORT_PATH=actors.Actor NDIF_CONTROLLER_IMPORT_PATH=actors.Controller
MECHVLM_FORKS=$(mktemp -u)
export MECHVLM_FORKS  # the socket of forking.py
export NDIF_DEFAULT_DTYPE=float32 NDIF_DEFAULT_PADDING_BIAS=0 NDIF_MINIMUM_DEPLOYMENT_TIME_SECONDS=0
export NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS=${NDIF_TIMEOUT:-60} NDIF_SANDBOX_POOL_SIZE=2

# No part of the server uses the network.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 NO_COLOR=1 AWS_EC2_METADATA_DISABLED=true
# No authentication: the home folder may hold the token of another Ray.
export RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 RAY_DISABLE_MEMORY_MONITOR=1 GRPC_ENABLE_FORK_SUPPORT=0
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
