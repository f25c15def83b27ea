#!/usr/bin/env bash
# The one way in, for the image, for pods and for `make serve`: serve.sh [MODEL] [any `vllm serve` flag]
#
#   NVFP4_MODEL            the checkpoint, where no MODEL is given
#   NVFP4_HOST, NVFP4_PORT where HTTP listens (0.0.0.0, 8000)
#   NVFP4_DRAIN_S          seconds that running requests get after SIGTERM (60)
#   NVFP4_REQUIRE_API_KEY  1: refuse to start without VLLM_API_KEY; vLLM serves everyone when it is empty
#   NVFP4_WARMUP           sweep: warmup.py beside the server, for which `nvfp4 probe ready` waits (README.md has the others)
#   VLLM_API_KEY           the key; never a flag, which every process of the machine could read
#
# In a LeaderWorkerSet (LWS_GROUP_SIZE above 1) it adds vLLM's flags for several nodes; workers serve no HTTP.
set -euo pipefail

if (($# == 0)) || [[ $1 == -* ]]; then
  : "${NVFP4_MODEL:?serve.sh: no checkpoint: give it as the first argument, or set NVFP4_MODEL}"
  set -- "$NVFP4_MODEL" "$@"
fi
for argument in "$@"; do
  if [[ $argument == --api-key || $argument == --api-key=* ]]; then
    echo "serve.sh: --api-key shows the key to every process of the machine; set VLLM_API_KEY instead" >&2
    exit 64
  fi
done
if [[ ${NVFP4_REQUIRE_API_KEY:-0} == 1 && -z ${VLLM_API_KEY:-} ]]; then
  echo "serve.sh: NVFP4_REQUIRE_API_KEY=1, but VLLM_API_KEY is empty, and vLLM would serve everyone; set it" >&2
  exit 64
fi
if [[ ${NVFP4_WARMUP:-} == sweep && -z ${NVFP4_STATUS_FILE:-} ]]; then
  echo "serve.sh: NVFP4_WARMUP=sweep, but without NVFP4_STATUS_FILE no probe could wait for it; set it" >&2
  exit 64
fi

model=$1
shift
flags=()
if ((${LWS_GROUP_SIZE:-1} > 1)); then
  flags+=(--nnodes "$LWS_GROUP_SIZE" --node-rank "$LWS_WORKER_INDEX" --master-addr "$LWS_LEADER_ADDRESS")
fi
if ((${LWS_WORKER_INDEX:-0} > 0)); then
  flags+=(--headless)
else
  flags+=(--host "${NVFP4_HOST:-0.0.0.0}" --port "${NVFP4_PORT:-8000}")
fi
if [[ ${NVFP4_WARMUP:-} == sweep ]] && ((${LWS_WORKER_INDEX:-0} == 0)); then
  # Longer prompts reach no other kernels, and take minutes (docs/warmup.md).
  python3 "$(dirname "${BASH_SOURCE[0]}")/warmup.py" --gate --max-len 32768 --limit-s 900 &
fi
# exec: signals of a kubelet or of `docker stop` reach the server itself.
exec nvfp4 serve "$model" "${flags[@]}" --shutdown-timeout "${NVFP4_DRAIN_S:-60}" "$@"
