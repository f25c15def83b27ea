# The server, as an image: docker build .  or  docker build --build-arg FLAVOR=cpu .
# scripts/image_build.sh does it with the bases of versions.env, a name and labels.
#
# base-*       vLLM as published (gpu), or vLLM for CPUs from our lock (cpu). A change to our code leaves it alone.
# toolchain-*  base with a C compiler to link kernels with; nothing of it reaches the image.
# tilelang     vLLM's TileLang kernels of DeepSeek-V4, compiled for every architecture. No GPU is needed, but nvcc is.
# deepgemm     vLLM's DeepGEMM kernels of DeepSeek-V4, likewise.
# build        our wheel, and every kernel of ours compiled for every architecture. No GPU is needed.
# image        base, the wheel, the kernels, scripts; then the check, which ends the build where something does not fit.
#
# Host code of the kernels is made for the building machine's CPU. The set's manifest lists the features that the code
# uses (`cpu_features`); a server whose CPU lacks one of them refuses the set and names it.

ARG FLAVOR=gpu
# tests/image/test_dockerfile.py holds both to versions.env.
ARG BASE_IMAGE=docker.io/vllm/vllm-openai:v0.32.0
ARG CPU_BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG KERNEL_ARCHS=sm_100a,sm_90a

FROM ${BASE_IMAGE} AS base-gpu
USER root

FROM ${CPU_BASE_IMAGE} AS base-cpu
COPY versions.env scripts/image_packages.sh /opt/packages/
COPY requirements/cpu-py311.lock requirements/cpu-py312.lock /opt/packages/requirements/
RUN /opt/packages/image_packages.sh /opt/packages
# vLLM's kernels for CPUs need it; without, vLLM logs one line and computes nothing.
RUN apt-get update -q && apt-get install -yq --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*

# vLLM's image has a C compiler, as Triton needs one.
FROM base-gpu AS toolchain-gpu
RUN command -v cc || command -v gcc || { echo "BASE_IMAGE has no C compiler to link kernels with" >&2; exit 1; }

FROM base-cpu AS toolchain-cpu
RUN apt-get update -q && apt-get install -yq --no-install-recommends gcc libc6-dev

FROM toolchain-${FLAVOR} AS tilelang
ARG KERNEL_ARCHS
# 1: the build ends where there is no TileLang or no nvcc, instead of saying so and leaving these kernels out.
ARG REQUIRE_TILELANG=0
# Alone: these kernels depend on vLLM and nothing else of ours, and take 15 minutes of one core.
COPY patches/vllm_nvfp4/tilelang_build.py /src/
RUN python3 /src/tilelang_build.py --arch "${KERNEL_ARCHS}" --out /out/tilelang \
    $([ "${REQUIRE_TILELANG}" = 0 ] || echo --require)

FROM toolchain-${FLAVOR} AS deepgemm
ARG KERNEL_ARCHS
# As REQUIRE_TILELANG.
ARG REQUIRE_DEEPGEMM=0
WORKDIR /src
# Their names in DeepGEMM's cache have the base's nvcc and headers in them. Some 8 minutes of one core.
COPY patches/vllm_nvfp4/__init__.py patches/vllm_nvfp4/tilelang_build.py patches/vllm_nvfp4/deepgemm_build.py vllm_nvfp4/
RUN python3 -m vllm_nvfp4.deepgemm_build --arch "${KERNEL_ARCHS}" --out /out/deepgemm \
    $([ "${REQUIRE_DEEPGEMM}" = 0 ] || echo --require)

FROM toolchain-${FLAVOR} AS build
# Pro's kernels include Flash's.
ARG KERNEL_MODEL=deepseek-v4-pro
ARG KERNEL_ARCHS
ARG KERNEL_TP=1,2,4,8
WORKDIR /src
# Finds what the manifest lists, from the index that pip knows. Not for the image, though the lock of the flavor cpu has it.
COPY requirements/build.lock ./
RUN python3 -m pip --disable-pip-version-check --no-cache-dir --quiet install --root-user-action=ignore --no-deps \
    --require-hashes -r build.lock
# Kernels first, which take a minute or two: a change to the overlay does not compile them again.
COPY cutedsl cutedsl
RUN python3 -m cutedsl.aot build --model "${KERNEL_MODEL}" --arch "${KERNEL_ARCHS}" --tp "${KERNEL_TP}" --out /out/aot
COPY pyproject.toml README.md LICENSE ./
COPY ptxsim ptxsim
COPY patches patches
RUN python3 -m pip wheel --quiet --no-deps --no-build-isolation --no-index --wheel-dir /out/wheels .

FROM base-${FLAVOR} AS image
ARG FLAVOR
# A vLLM other than the tested one, exactly as pip names it: for a nightly base.
ARG ALLOW_UNTESTED_VLLM=
USER root
WORKDIR /
COPY --from=build /out/aot /opt/nvfp4/aot
COPY --from=tilelang /out/tilelang /opt/nvfp4/tilelang
COPY --from=deepgemm /out/deepgemm /opt/nvfp4/deepgemm
COPY versions.env /opt/nvfp4/
COPY requirements /opt/nvfp4/requirements
COPY scripts /opt/nvfp4/scripts
# Copied, not mounted while it is installed: buildah 1.28 takes a cached layer although what was mounted has changed.
COPY --from=build /out/wheels /opt/nvfp4/wheels
RUN python3 -m pip install --quiet --no-deps --no-index --no-cache-dir --root-user-action=ignore \
    /opt/nvfp4/wheels/*.whl \
  && rm -r /opt/nvfp4/wheels \
  && python3 -m pip inspect > /opt/nvfp4/sbom.json \
  && echo 'nvfp4:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd \
  && echo 'nvfp4:x:10001:' >> /etc/group \
  && chmod -R a+rX,go-w /opt/nvfp4
# Everything that a server writes goes below /tmp: the one place that must be writable.
ENV HOME=/tmp \
    LOGNAME=nvfp4 \
    XDG_CACHE_HOME=/tmp/cache \
    XDG_CONFIG_HOME=/tmp/config \
    VLLM_DO_NOT_TRACK=1 \
    PYTHONUNBUFFERED=1 \
    NVFP4_ALLOW_UNTESTED_VLLM=${ALLOW_UNTESTED_VLLM} \
    NVFP4_AOT_DIR=/opt/nvfp4/aot \
    NVFP4_NO_JIT=1 \
    NVFP4_TILELANG_DIR=/opt/nvfp4/tilelang \
    NVFP4_DEEPGEMM_DIR=/opt/nvfp4/deepgemm \
    TILELANG_CACHE_DIR=/tmp/cache/tilelang \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    FLASHINFER_WORKSPACE_BASE=/tmp/cache \
    NVFP4_STATUS_FILE=/tmp/nvfp4/status
USER 10001:10001
RUN python3 /opt/nvfp4/scripts/image_check.py "${FLAVOR}" && find /tmp -mindepth 1 -user nvfp4 -delete
EXPOSE 8000
STOPSIGNAL SIGTERM
# Healthy: a token was really computed. Kubernetes ignores this and has its own probes (k8s/).
HEALTHCHECK --interval=30s --timeout=15s --start-period=60m --retries=3 \
    CMD nvfp4 probe ready --port "${NVFP4_PORT:-8000}"
ENTRYPOINT ["/opt/nvfp4/scripts/serve.sh"]
# Last, as they change with every commit.
ARG REVISION=unknown
ARG VERSION=unknown
ARG BASE_NAME=unknown
ARG BASE_DIGEST=
LABEL org.opencontainers.image.title="nvfp4-deepseek-v4" \
      org.opencontainers.image.description="DeepSeek-V4 with every quantized matrix in NVFP4, on vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_NAME}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}"
