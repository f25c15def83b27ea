#!/usr/bin/env bash
# Build the image: image_build.sh [gpu|cpu] [more flags of the build command]. Its tag is nvfp4-deepseek-v4:VERSION,
# with -cpu behind it for cpu.
#
#   BUILDER            docker, or `buildah` with its own flags; default whichever of docker, podman, buildah is there
#   BASE_IMAGE         instead of versions.env's: a nightly, a mirror, or one pinned otherwise
#   KERNEL_ARCHS       default sm_100a,sm_90a
#
# --build-arg REQUIRE_TILELANG=1 and REQUIRE_DEEPGEMM=1: no image without vLLM's kernels of either, compiled ahead of time.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=../versions.env
source versions.env
flavor=${1:-gpu}
if [[ $flavor != gpu && $flavor != cpu ]]; then
  echo "image_build: flavor is $flavor, expected gpu or cpu" >&2
  exit 64
fi
shift $(($# > 0))

if [[ -z ${BUILDER:-} ]]; then
  for candidate in docker podman buildah; do
    if command -v "$candidate" >/dev/null; then
      BUILDER=$candidate
      break
    fi
  done
fi
if [[ -z ${BUILDER:-} ]]; then
  echo "image_build: none of docker, podman and buildah is installed; install one, or name it in BUILDER" >&2
  exit 1
fi
read -ra command <<<"$BUILDER"
format=()
if [[ ${command[0]##*/} != docker ]]; then
  # The OCI format has no HEALTHCHECK.
  format=(--format docker --layers)
fi

if [[ $flavor == gpu ]]; then
  name=BASE_IMAGE base=${BASE_IMAGE:-$VLLM_IMAGE${VLLM_IMAGE_DIGEST:+@$VLLM_IMAGE_DIGEST}} suffix=
else
  name=CPU_BASE_IMAGE base=${BASE_IMAGE:-$CPU_BASE_IMAGE} suffix=-cpu
fi
if [[ $base != *@sha256:* ]]; then
  echo "image_build: $base is a tag, which may name another image tomorrow; pin it: BASE_IMAGE=NAME@sha256:..." >&2
fi
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
if [[ $revision != unknown && -n $(git status --porcelain 2>/dev/null) ]]; then
  revision+=-modified
fi
digest=${base##*@}
[[ $digest == "$base" ]] && digest=""
# FLAVOR is said even where it is the default: buildah 1.28 looks for unused stages without defaults.
exec "${command[@]}" build "${format[@]}" --build-arg "FLAVOR=$flavor" --build-arg "$name=$base" \
  --build-arg "KERNEL_ARCHS=${KERNEL_ARCHS:-sm_100a,sm_90a}" --build-arg "VERSION=$version" \
  --build-arg "REVISION=$revision" --build-arg "BASE_NAME=${base%%@*}" --build-arg "BASE_DIGEST=$digest" \
  --tag "nvfp4-deepseek-v4:$version$suffix" "$@" .
