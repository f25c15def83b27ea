#!/usr/bin/env bash
# The Python packages of the CPU flavor, into the image that is being built: image_packages.sh FOLDER, which holds
# versions.env and requirements/. The Dockerfile runs it in a layer that our code is no part of.
set -euo pipefail
cd "$1"
# shellcheck source=../versions.env
source versions.env
version=$(python3 -c 'import sys; print("%d%d" % sys.version_info[:2])')
lock=requirements/cpu-py$version.lock
if [[ ! -f $lock ]]; then
  echo "image_packages: there is no $lock: use a base with Python 3.11 or 3.12" >&2
  exit 1
fi
pip=(python3 -m pip --disable-pip-version-check --no-cache-dir --quiet install --root-user-action=ignore --no-deps)
# As scripts/setup_env.sh does: the build named +cpu, from PyTorch's own index only where pip does not find it.
if ! "${pip[@]}" "torch==${TORCH_VERSION}+cpu" 2>/dev/null; then
  "${pip[@]}" --index-url "$TORCH_CPU_INDEX" "torch==${TORCH_VERSION}+cpu"
fi
"${pip[@]}" --require-hashes -r "$lock"
