#!/usr/bin/env bash
# Resolve requirements/*.in into exact, hashed locks, one for each supported Python (build.lock serves both). Needs uv.
set -euo pipefail
cd "$(dirname "$0")/../requirements"
for version in 3.11 3.12; do
  for name in cpu modelopt; do
    uv pip compile --quiet "$name.in" --override overrides.txt --python-version "$version" \
      --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --output-file "$name-py${version/./}.lock"
  done
  uv pip compile --quiet conformance.in --no-deps --python-version "$version" \
    --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --output-file "conformance-py${version/./}.lock"
done
uv pip compile --quiet build.in --no-deps --python-version 3.11 \
  --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --output-file build.lock
