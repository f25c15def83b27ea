#!/usr/bin/env bash
# Resolve requirements/cpu.in into one exact, hashed lock for each supported Python. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/../requirements"
for version in 3.11 3.12; do
  uv pip compile --quiet cpu.in --override overrides.txt --python-version "$version" \
    --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --output-file "cpu-py${version/./}.lock"
done
