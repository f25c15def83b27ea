"""The GPUs that a plan can be made for, with the memory that CUDA really offers on each.

The hard part is the number: neither the advertised gigabytes nor what nvidia-smi prints is what an engine can use. Taken is
what `cudaMemGetInfo` calls total, which is what vLLM multiplies with --gpu-memory-utilization. PyTorch prints it when it runs
out of memory ("has a total capacity of ... GiB"); each value below was read in several public reports of that message.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """name; advertised_gb as sold; total_bytes as CUDA reports; nvlink_domain: GPUs that tensor parallelism may span."""

    name: str
    advertised_gb: int
    total_bytes: int
    nvlink_domain: int
    source: str

    @property
    def default_batched_tokens(self) -> int:
        """vLLM 0.32's --max-num-batched-tokens for a server on this GPU."""
        return 16384 if self.total_bytes >= 160 * GIB else 8192


def _gpu(name: str, advertised_gb: int, total_gib: float, nvlink_domain: int, more: str = "") -> Gpu:
    source = f"PyTorch's out-of-memory message in public reports: {total_gib} GiB{more}"
    return Gpu(name, advertised_gb, int(total_gib * GIB), nvlink_domain, source)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("h100", 80, 79.10, 8, " (79.10 to 79.18, by driver)"),
        _gpu("h200", 141, 139.80, 8),
        _gpu("b200", 192, 178.35, 8, "; CUDA device query in pytorch/ao#4002; DGX B200: 1440 GB for 8"),
        _gpu("b300", 288, 267.69, 8),
        _gpu("gb200", 192, 184.31, 72),
        _gpu("gb300", 288, 276.50, 72),
    )
}


def find(name: str) -> Gpu:
    """The GPU of this name, in any case.

    Raises: ValueError - unknown; lists the known ones.
    """
    gpu = GPUS.get(name.strip().lower())
    if gpu is None:
        raise ValueError(f"--gpu {name!r} is not known; expected one of {', '.join(GPUS)}")
    return gpu
