#!/bin/bash
# Everything that is shown on a GPU, with logs that say on what: scripts/gpu_check.sh OUT_DIR [STEP ...]
#
# Steps: tests (kernels and runners), memcheck, racecheck (compute-sanitizer), linear, moe (benchmarks); with vLLM for CUDA
# sets (kernels built ahead of time, for the steps behind it), engine, parallel (two GPUs), midsize (a random checkpoint of
# V4-Pro's shapes, served in one process and measured), serve (the same over HTTP, as a pod would: ready after its sweep, load,
# SIGTERM). Default: tests, memcheck, racecheck. Each writes OUT_DIR/STEP.log, benchmarks OUT_DIR/STEP.jsonl too, midsize
# OUT_DIR/midsize.json, serve OUT_DIR/server.log.
#
#   PYTHON          interpreter, default python3
#   NVFP4_AOT_DIR   kernels built ahead of time; without it, and without the step sets, CuTe DSL compiles them
#   SETS_DIR        where sets are, or are made, default ${TMPDIR:-/tmp}/nvfp4-sets
#   COMMIT          where there is no git
#   BENCH_SECONDS   of measuring, without preparation, for each benchmark, default 100
#   BENCH_PEERS     default marlin,cublas for linear and marlin for moe; none without vLLM; may name humming (pip's
#                   humming-kernels in the version that vLLM asks for), which compiles long at a shape's first call
#   MIDSIZE_DIR     where that checkpoint is, or is made (11 GB), default ${TMPDIR:-/tmp}/nvfp4-midsize; MIDSIZE_FLAGS: of
#                   gpu_engine.py
#   SERVE_LIMIT_S   until the server must be ready, default 600; SERVE_FLAGS, PROOF_FLAGS: of serve.sh and warmup.py
set -uo pipefail

if [ $# -lt 1 ]; then
    sed -n '2,${/^#/!q;s/^# \?//p}' "$0" >&2
    exit 64
fi
out=$(realpath -m "$1")
shift
steps=("${@:-tests memcheck racecheck}")
read -ra steps <<<"${steps[*]}"
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out"
PYTHON=${PYTHON:-python3}
COMMIT=${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
export COMMIT PYTHONPATH="$PWD:$PWD/patches${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

header() {
    echo "# $(date -u +%FT%TZ), commit $COMMIT"
    echo "# $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader)"
    echo "# $($PYTHON -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)')"
    echo "# $*"
}

model=${MIDSIZE_DIR:-${TMPDIR:-/tmp}/nvfp4-midsize}
sets=${SETS_DIR:-${TMPDIR:-/tmp}/nvfp4-sets}

random_model() {
    [ -f "$model/config.json" ] || "$PYTHON" scripts/make_random_checkpoint.py "$model"
}

sets() (
    random_model || return
    local arch models="$model/config.json,tests/data/affine-a/config.json"
    arch=$("$PYTHON" -c 'import torch; print("sm_%d%da" % torch.cuda.get_device_capability())') || return
    # Both believe in a GPU that they choose.
    export CUDA_VISIBLE_DEVICES=
    "$PYTHON" -m cutedsl.aot build --model deepseek-v4-pro --arch "$arch" --out "$sets/cutedsl" &&
        "$PYTHON" -m vllm_nvfp4.tilelang_build --arch "$arch" --model "$models" --out "$sets/tilelang" --require &&
        "$PYTHON" -m vllm_nvfp4.deepgemm_build --arch "$arch" --model "$model/config.json" --out "$sets/deepgemm" --require
)

use_sets() {
    [ ! -d "$sets/cutedsl" ] || export NVFP4_AOT_DIR=${NVFP4_AOT_DIR:-$sets/cutedsl}
    [ ! -d "$sets/tilelang" ] || export NVFP4_TILELANG_DIR=${NVFP4_TILELANG_DIR:-$sets/tilelang}
    [ ! -d "$sets/deepgemm" ] || export NVFP4_DEEPGEMM_DIR=${NVFP4_DEEPGEMM_DIR:-$sets/deepgemm}
}

midsize() {
    random_model && "$PYTHON" scripts/gpu_engine.py --model "$model" --out "$out/midsize.json" ${MIDSIZE_FLAGS-}
}

serve() (
    random_model || return
    local work pid ready=1 code=0 begin=$SECONDS
    work=$(mktemp -d)
    # On a bare host nothing is installed.
    printf '#!/bin/sh\nexec "%s" -m vllm_nvfp4.cli "$@"\n' "$PYTHON" >"$work/nvfp4"
    chmod +x "$work/nvfp4"
    export PATH="$work:$PATH" NVFP4_STATUS_FILE=$work/status NVFP4_PORT=8000 NVFP4_SIDE_PORT=9400
    export NVFP4_WARMUP=${NVFP4_WARMUP:-sweep} VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$work/cache}
    scripts/serve.sh "$model" --max-model-len 4096 --max-num-seqs 32 ${SERVE_FLAGS---gpu-memory-utilization 0.5} \
        >"$out/server.log" 2>&1 &
    pid=$!
    while kill -0 $pid 2>/dev/null && [ $((SECONDS - begin)) -lt "${SERVE_LIMIT_S:-600}" ]; do
        nvfp4 probe ready >"$work/probe" 2>&1 && ready=0 && break
        sleep 1
    done
    echo "ready: exit code $ready after $((SECONDS - begin)) s: $(tail -n 1 "$work/probe")"
    grep -h "sweep_requests" "$out/server.log"
    if [ $ready = 0 ]; then
        "$PYTHON" scripts/warmup.py --local --cache "$VLLM_CACHE_ROOT" ${PROOF_FLAGS-} || code=1
        "$PYTHON" scripts/load_test.py --url "http://127.0.0.1:$NVFP4_PORT" --users 8 --seconds "${LOAD_S:-20}" || code=1
    fi
    kill -TERM $pid
    wait $pid
    echo "server: exit code $? behind SIGTERM"
    rm -rf "$work"
    return $((ready || code))
)

run() { # STEP COMMAND...
    local step=$1 begin=$SECONDS
    shift
    { header "$@"; "$@"; } >"$out/$step.log" 2>&1
    local code=$?
    echo "# exit code $code after $((SECONDS - begin)) s" >>"$out/$step.log"
    echo "== $step: exit code $code after $((SECONDS - begin)) s"
    tail -n "${TAIL:-15}" "$out/$step.log"
    return $code
}

failed=()
for step in "${steps[@]}"; do
    sanitizer=(compute-sanitizer --error-exitcode 1 --tool)
    use_sets
    case $step in
    sets | serve) command=("$step") ;;
    tests) command=("$PYTHON" -m pytest tests/gpu -m "not engine and not parallel" -q --durations=10) ;;
    parallel) command=("$PYTHON" -m pytest tests/gpu -m parallel -q -s) ;;
    engine) command=("$PYTHON" -m pytest tests/gpu -m engine -q -s) ;;
    midsize) command=(midsize) TAIL=${TAIL:-45} ;;
    memcheck) command=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer[@]}" memcheck --report-api-errors no "$PYTHON" tests/gpu/sanitize.py) ;;
    racecheck) command=("${sanitizer[@]}" racecheck "$PYTHON" tests/gpu/sanitize.py) ;;
    linear | moe)
        peers=${BENCH_PEERS:-$([ "$step" = moe ] && echo marlin || echo marlin,cublas)}
        command=("$PYTHON" "scripts/bench/$step.py" --peers "$peers" --seconds-budget "${BENCH_SECONDS:-100}" --out "$out/$step.jsonl")
        ;;
    *)
        echo "unknown step $step" >&2
        exit 64
        ;;
    esac
    run "$step" "${command[@]}" || failed+=("$step")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
