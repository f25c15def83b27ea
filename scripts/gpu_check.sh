#!/bin/bash
# Everything that is shown on a GPU, with logs that say on what: scripts/gpu_check.sh OUT_DIR [STEP ...]
#
# Steps: tests (kernels and runners), memcheck, racecheck (compute-sanitizer), linear, moe (benchmarks); with vLLM for CUDA
# engine, parallel (two GPUs) and midsize (a random checkpoint of V4-Pro's shapes, served and measured). Default: tests,
# memcheck, racecheck. Each writes OUT_DIR/STEP.log, benchmarks OUT_DIR/STEP.jsonl too, midsize OUT_DIR/midsize.json.
#
#   PYTHON          interpreter, default python3
#   NVFP4_AOT_DIR   kernels built ahead of time; without it they are compiled by CuTe DSL. Engines start sooner with
#                   NVFP4_TILELANG_DIR too (docs/warmup.md)
#   COMMIT          where there is no git
#   BENCH_SECONDS   of measuring, without preparation, for each benchmark, default 100
#   BENCH_PEERS     default marlin,cublas for linear and marlin for moe; none without vLLM; may name humming (pip's
#                   humming-kernels in the version that vLLM asks for), which compiles long at a shape's first call
#   MIDSIZE_DIR     where midsize's checkpoint is, or is made (11 GB), default ${TMPDIR:-/tmp}/nvfp4-midsize
set -uo pipefail

if [ $# -lt 1 ]; then
    sed -n '2,15s/^# \?//p' "$0" >&2
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

midsize() {
    local model=${MIDSIZE_DIR:-${TMPDIR:-/tmp}/nvfp4-midsize}
    [ -f "$model/config.json" ] || "$PYTHON" scripts/make_random_checkpoint.py "$model" || return
    "$PYTHON" scripts/gpu_engine.py --model "$model" --out "$out/midsize.json"
}

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
    case $step in
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
