"""DeepGEMM's kernels of DeepSeek-V4 (hyper-connections, the indexer) compiled ahead of time, where there is no GPU.

    python -m vllm_nvfp4.deepgemm_build --out DIR [--model NAME_OR_CONFIG,...] [--arch ARCH,...] [--jobs N] [--require]

DeepGEMM compiles a kernel when it is first called, one behind the other: one for each way to split the hyper-connections'
GEMM, and a few for the indexer.

The hard part is that DeepGEMM must find them. A kernel of its cache is a folder, NAME.DIGEST, and the digest is a hash of
the kernel's text, of each header of DeepGEMM's that it includes, of nvcc's flags, of CUTLASS's version and of all that
`nvcc --version` prints. `_text` and `digest` are that library's format, not our design: they follow the sources of DeepGEMM
2.8.0 and of DeepJIT, and are held to kernels that vLLM 0.32.0 had compiled on an H200. Neither the place of DeepGEMM nor
CUDA's is part of it. A kernel that is missed, or whose name differs, costs the time to compile it at start and nothing
else; `deepgemm_set` counts those.

What sm_100a asks for, and the indexer's kernel of prefills on sm_90a, were read from the sources: not verified on hardware.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from vllm_nvfp4.tilelang_build import NUM_SMS, RECORD, command

# arch -> what DeepGEMM names nvcc: on Blackwell the family.
NVCC_ARCH = {"sm_90a": "sm_90a", "sm_100a": "sm_100f"}
FLAGS = (
    "-O3 --compiler-options=-O3 --ptxas-options=--register-usage-level=10 -std=c++20 --compiler-options=-fPIC "
    "--compiler-options=-fconcepts --expt-relaxed-constexpr --expt-extended-lambda "
    "--diag-suppress=39,161,174,177,186,940 --compiler-options=-Wno-deprecated-declarations,-Wno-abi"
)
# In a cache: a folder of folders, each with the kernel, its text for people, and this, which says that all is there.
ENTRIES = "cache"
COMMITTED = ".committed"
# vLLM's default --max-num-seqs on these GPUs, with one drafted token for each: as far as our warm-up asks for schedules.
MAX_ROWS = 1024 * 2


@dataclass(frozen=True)
class Sizes:
    """What the kernels depend on, in the spelling of config.json."""

    hidden_size: int
    hc_mult: int
    index_n_heads: int
    index_head_dim: int


# Source: config.json of the published models, see tests/data/configs/README.md.
MODELS = {
    "deepseek-v4-pro": Sizes(7168, 4, 64, 128),
    "deepseek-v4-flash": Sizes(4096, 4, 64, 128),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel: its name in the cache, and the text that DeepGEMM has for it."""

    name: str
    text: str


# ---- what a model asks for -------------------------------------------------------------------------------------------


def kernels(sizes: Sizes, arch: str) -> list[Kernel]:
    """Every kernel that vLLM can ask of DeepGEMM for this model, its experts and linears being ours.

    Source: vLLM's `_hc_prenorm_gemm_outputs`, and `fp8_fp4_mqa_logits`, `fp8_fp4_paged_mqa_logits` and their schedule as
    its sparse_attn_indexer calls them; without a number of drafts that sm_90a lays out otherwise (three).

    Raises: ValueError - the hyper-connections or the indexer have a size that DeepGEMM has no kernel for.
    """
    if sizes.hc_mult != 4:
        raise ValueError(f"hc_mult is {sizes.hc_mult}, expected 4: DeepGEMM's kernels were read for no other")
    if sizes.index_n_heads not in (32, 64) or sizes.index_head_dim != 128:
        raise ValueError(
            f"the indexer has {sizes.index_n_heads} heads of {sizes.index_head_dim}, expected 32 or 64 of 128"
        )
    num_sms = NUM_SMS[arch]
    # K is the hidden size in the first layer, whose copies of the hidden state are still the same.
    gemms = [
        _prenorm_gemm("sm90" if arch == "sm_90a" else "sm100", sizes.hc_mult, k, count)
        for k in (sizes.hidden_size * sizes.hc_mult, sizes.hidden_size)
        for count in splits(num_sms, k)
    ]
    indexer = _indexer_sm90 if arch == "sm_90a" else _indexer_sm100
    return gemms + indexer(sizes.index_n_heads, sizes.index_head_dim, num_sms)


def splits(num_sms: int, k: int) -> list[int]:
    """Ways in which steps of any length split a reduction of `k`: vLLM's `compute_num_split` of 1, 2, ... tiles of tokens.

    Each SM gets a part while there are fewer tiles than SMs, and no part is shorter than four blocks of 64.
    """
    longest = -(-k // 64) // 4
    return sorted({max(1, min(num_sms // tiles, longest)) for tiles in range(1, num_sms + 1)}, reverse=True)


def _prenorm_gemm(prefix: str, hc_mult: int, k: int, num_splits: int) -> Kernel:
    name = f"{prefix}_tf32_hc_prenorm_gemm"
    n = hc_mult * (hc_mult + 2)  # before, behind and between the copies
    # Tiles of 64 x 32 x 64, splits, bytes of a swizzled row, stages, threads that compute and that load.
    lines = (f"{n}, {k}", "64, 32, 64", f"{num_splits}", "128", "12", "128, 128")
    return Kernel(name, _text(f"impls/{name}", f"{name}_impl", lines))


def _indexer_sm90(num_heads: int, head_dim: int, num_sms: int) -> list[Kernel]:
    name = "sm90_fp8_mqa_logits"
    shape = f"{num_heads}, {head_dim}"
    found = [
        Kernel(
            name,
            _text(
                f"impls/{name}",
                name,
                (shape, "false, false", f"{128 // num_heads}, 256", "3, 3", f"{num_sms}", "128, 512", "float"),
            ),
        )
    ]
    name = "sm90_fp8_paged_mqa_logits"
    for tokens in (1, 2):  # of a request: without a draft, with one
        lines = (f"{tokens}, {num_heads}", f"{head_dim}, 64", "true, false", "3, 3", "256", "128, 512", "1", "float")
        found.append(Kernel(name, _text(f"impls/{name}", name, lines)))
    name = "sm90_paged_mqa_logits_metadata"
    for rows in range(32, MAX_ROWS + 1, 32):
        schedule = (f"{rows}, 256, {num_sms}, false",)
        found.append(Kernel(name, _text("scheduler/sm90_paged_mqa_logits", f"sched::{name}", schedule)))
    return found


def _indexer_sm100(num_heads: int, head_dim: int, num_sms: int) -> list[Kernel]:
    """With keys in FP8, vLLM's default; each token of a request is a row of its own (`indices`)."""
    block_q, split_kv, q_stages, kv_stages = 128 // num_heads, 256, 3, 5
    stages, types = f"{q_stages}, {kv_stages}", "cutlass::float_e4m3_t"
    asserted = (
        "static_assert(sizeof(layout::MQALogitsSharedStorage<\n"
        f"    {num_heads}, {head_dim}, false, {block_q}, {split_kv}, {stages}, 3, {types}, float\n"
        f">) == {_shared_bytes(block_q * num_heads, head_dim, split_kv, q_stages, kv_stages)}, "
        '"Incorrect MQA logits shared-memory size");\n\n'
    )
    one_prompt = (
        f"{num_heads}, {head_dim}", "false", "false, false, false", f"{block_q}, {split_kv}", stages, f"{num_sms}",
        "128, 256", f"{types}, float", "float",
    )  # fmt: skip
    paged = (
        f"1, {num_heads}", f"{head_dim}, 64", "false, true, true", stages, f"{split_kv}, 16", "128, 256",
        f"{types}, float, float",
    )  # fmt: skip
    name = "sm100_paged_mqa_logits_metadata"
    schedule = _text("scheduler/sm100_paged_mqa_logits", f"sched::{name}", (f"1, true, true, {split_kv}, {num_sms}",))
    header = "impls/sm100_mqa_logits"
    return [
        Kernel("sm100_mqa_logits", _text(header, "sm100_mqa_logits", one_prompt, asserted)),
        Kernel("sm100_paged_mqa_logits", _text(header, "sm100_paged_mqa_logits", paged, asserted)),
        Kernel(name, schedule),
    ]


def _shared_bytes(num_rows: int, head_dim: int, split_kv: int, q_stages: int, kv_stages: int) -> int:
    """Size of MQALogitsSharedStorage with FP8; nvcc refuses the kernel where it is another."""
    swizzled = q_stages * num_rows * head_dim + kv_stages * split_kv * head_dim
    # A scale of Q, not used; one a key; one a head and row: each stage's are aligned to 128 bytes together.
    q_scales, kv_scales = -(-q_stages * 4 // 128) * 128, kv_stages * split_kv * 4
    weights = q_stages * num_rows * 4
    barriers = 2 * (q_stages + kv_stages + 3) * 8 + 4
    total, alignment = swizzled + q_scales + kv_scales + weights + barriers, 8 * head_dim
    return -(-total // alignment) * alignment


def _text(header: str, function: str, lines: tuple[str, ...], asserted: str = "") -> str:
    """A kernel's text as DeepGEMM writes it, byte for byte: it is hashed."""
    arguments = ",\n        ".join(lines)
    return (
        f"\n#include <deep_gemm/{header}.cuh>\n\nusing namespace deep_gemm;\n\n{asserted}"
        "static void __instantiate_kernel() {\n"
        f"    auto ptr = reinterpret_cast<void*>(&{function}<\n        {arguments}\n    >);\n}};\n"
    )


# ---- the name of a kernel in DeepGEMM's cache ------------------------------------------------------------------------


class _Hash:
    """DeepJIT's: two FNV-like streams of 64 bits over each part's length and bytes, mixed at the end."""

    def __init__(self) -> None:
        self.streams = [0xC6A4A7935BD1E995, 0xFF51AFD7ED558CCD]

    def update(self, data: bytes) -> None:
        first, second = self.streams
        for byte in len(data).to_bytes(8, "little") + data:
            first = ((first ^ byte) * 0x100000001B3) % 2**64
            second = ((second ^ byte) * 0x9E3779B97F4A7C15) % 2**64
        self.streams = [first, second]

    def digest(self) -> str:
        return "".join(f"{self._mix(stream):016x}" for stream in self.streams)

    @staticmethod
    def _mix(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31


def _hashed(*parts: bytes | str) -> str:
    state = _Hash()
    for part in parts:
        state.update(part.encode() if isinstance(part, str) else part)
    return state.digest()


def digest(include: Path, nvcc_version: str, arch: str, text: str) -> str:
    """The digest that DeepGEMM of `include` has for a kernel's text.

    Args:
        include: folder of DeepGEMM's headers.
        nvcc_version: all that `nvcc --version` prints.
        arch: of NVCC_ARCH.
        text: of a Kernel.

    Raises: OSError - a header is not there.
    """
    no_hook = ""
    return _hashed(
        f"cutlass-{_cutlass(include)}", _hashed(nvcc_version), flags(arch), no_hook, _tree(include, text.encode())
    )


def flags(arch: str) -> str:
    """nvcc's, as they are hashed: without the folder of headers."""
    return f"--gpu-architecture={NVCC_ARCH[arch]} {FLAGS}"


@functools.cache
def _cutlass(include: Path) -> int:
    """CUTLASS_VERSION, 421 for 4.2.1: DeepGEMM has it from when it was built, with these headers."""
    text = (include / "cutlass" / "version.h").read_text(encoding="utf-8")
    major, minor, patch = (int(number) for number in re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH)\s+(\d+)", text))
    return major * 100 + minor * 10 + patch


def _tree(include: Path, text: bytes) -> str:
    """Of a text and behind it of each of DeepGEMM's headers that it includes, in their order."""
    included = re.findall(rb"^[ \t\f\v]*#[ \t\f\v]*include[ \t\f\v]*<(deep_gemm/[^\">\n]*)>", text, re.M)
    return _hashed(text, *(_header(include, name.decode()) for name in included))


@functools.cache
def _header(include: Path, name: str) -> str:
    return _tree(include, (include / name).read_bytes())


# ---- the build -------------------------------------------------------------------------------------------------------


def library() -> Path:
    """The folder of the DeepGEMM that vLLM imports: one that is installed, or vLLM's own.

    Raises: RuntimeError - there is neither.
    """
    for name, place in (("deep_gemm", "."), ("vllm", "third_party/deep_gemm")):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin and (Path(spec.origin).parent / place / "include").is_dir():
            return Path(spec.origin).parent / place
    raise RuntimeError("DeepGEMM is not installed")


def nvcc() -> Path:
    """Where DeepGEMM looks for it, which may be nowhere."""
    on_path = shutil.which("nvcc")
    default = Path(on_path).parents[1] if on_path else Path("/usr/local/cuda")
    return Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or default) / "bin" / "nvcc"


def nvcc_version() -> str:
    """All that it prints, as it is hashed.

    Raises: RuntimeError - it does not run.
    """
    done = subprocess.run(
        [str(nvcc()), "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{nvcc()} --version fails: {done.stdout.strip()}")
    return done.stdout


def missing_tool() -> str:
    """What keeps DeepGEMM from compiling here, or nothing."""
    try:
        library()
    except RuntimeError as error:
        return str(error)
    return "" if nvcc().is_file() else f"no nvcc: {nvcc()} is not there"


def entries(models: Iterable[Sizes], archs: Iterable[str]) -> Iterator[tuple[str, str, Kernel]]:
    """(NAME.DIGEST, arch, kernel) of everything that these models ask of the DeepGEMM and the nvcc that are here.

    Raises: ValueError - see `kernels`. RuntimeError, OSError - DeepGEMM, one of its headers or nvcc is not there.
    """
    include, version = library() / "include", nvcc_version()
    asked = {(arch, kernel): None for arch in archs for sizes in models for kernel in kernels(sizes, arch)}
    for arch, kernel in asked:
        yield f"{kernel.name}.{digest(include, version, arch, kernel.text)}", arch, kernel


def compile_kernel(kernel: Kernel, arch: str, entry: Path) -> None:
    """Compile one kernel into its folder of a cache, with DeepGEMM's own command.

    Raises: RuntimeError - nvcc refuses it.
    """
    entry.mkdir(parents=True)
    (entry / "kernel.cu").write_text(kernel.text, encoding="utf-8")
    command_line = [str(nvcc()), "kernel.cu", "--cubin", "--output-file", "kernel.cubin", *flags(arch).split()]
    command_line += ["--include-path", str(library() / "include")]
    done = subprocess.run(command_line, cwd=entry, capture_output=True, text=True, check=False)
    if done.returncode or not (entry / "kernel.cubin").is_file():
        raise RuntimeError(f"{entry.name} for {arch} does not compile: {(done.stdout + done.stderr).strip()}")
    (entry / COMMITTED).touch()


def build(models: Mapping[str, Sizes], archs: Sequence[str], out: Path, jobs: int) -> int:
    """Compile every kernel of these models into `out`, in the layout of DeepGEMM's cache; returns how many there are.

    Args:
        models: name -> sizes.
        archs: of NUM_SMS.
        out: new, or empty but for the record.
        jobs: processes of nvcc at a time.

    Raises: RuntimeError - one of them does not compile. ValueError, OSError - see `entries`.
    """
    asked = list(entries(models.values(), archs))
    with ThreadPoolExecutor(jobs) as processes:
        started = [
            processes.submit(compile_kernel, kernel, arch, out / ENTRIES / entry) for entry, arch, kernel in asked
        ]
        for done in as_completed(started):
            if error := done.exception():
                processes.shutdown(cancel_futures=True)
                raise error
    about = {
        "nvcc": nvcc_version(),
        "models": {name: dataclasses.asdict(sizes) for name, sizes in models.items()},
        "archs": list(archs),
        "kernels": len(asked),
    }
    (out / RECORD).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return len(asked)


def main(argv: list[str] | None = None) -> int:
    """See `tilelang_build.command`."""
    return command("deepgemm_build", "DeepGEMM", str(__doc__), MODELS, missing_tool, build, argv)


if __name__ == "__main__":
    sys.exit(main())
