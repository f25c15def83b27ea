"""Writes docs/kernels.md: what the machine code of every kernel says about itself, without a GPU.

    python scripts/kernel_table.py [-j JOBS]            # writes the file
    python scripts/kernel_table.py --check [-j JOBS]    # exit code 1 where the file is not what it would write

Every kernel that a deployment of the published models can call on Blackwell or Hopper (cutedsl.deployment) is compiled and
its cubin taken apart: registers and stack from its .nv.info section, static shared memory from its sections, dynamic shared
memory from the launch in the host code, instructions from nvdisasm, which the triton package brings (versions.env pins it).

The facts are static: they show that nothing spills and that the tensor core is used, and nothing about speed.
Source: CUDA Binary Utilities ("nvdisasm", "Instruction Set Reference"); .nv.info records are not documented, they were read
next to what nvdisasm prints of them.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cutedsl import compile as compiler
from cutedsl import deployment
from cutedsl.deployment import Variant

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "kernels.md"
# The GPU that each architecture is of.
ARCHS = {"sm_100a": "Blackwell", "sm_90a": "Hopper"}
TP = (1, 2, 4, 8)
_CUDA_MACHINE = 190
# Since Volta.
_INSTRUCTION_BYTES = 16
# Records of .nv.info: EIATTR_FRAME_SIZE and EIATTR_REGCOUNT, each a symbol's index and a number.
_SIZED_RECORD, _FRAME_SIZE, _REGISTERS = 4, 0x11, 0x2F
# The launch configuration of the CUDA runtime, whose third field is the dynamic shared memory.
_LAUNCH_CONFIG = r"struct<\(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32\)>"


@dataclass(frozen=True)
class Facts:
    """One kernel's machine code.

    Attributes:
        registers: of a thread at the launch.
        static_smem, dynamic_smem: bytes of a CTA.
        stack: bytes of a thread's frame in local memory.
        local: instructions that load or store local memory.
        mma: of the tensor core: block-scaled FP4 (UTCOMMA) or a warpgroup's (HGMMA).
        instructions: in all, with those that fill up the end.
    """

    registers: int
    static_smem: int
    dynamic_smem: int
    stack: int
    local: int
    mma: int
    instructions: int


# ---- cubins ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Section:
    name: str
    size: int
    content: bytes


def find_cubin(data: bytes) -> bytes:
    """The CUDA ELF image inside an object file.

    Raises:
        ValueError: there is not exactly one.
    """
    starts = [match.start() for match in re.finditer(rb"\x7fELF\x02", data)]
    starts = [start for start in starts if struct.unpack_from("<H", data, start + 18)[0] == _CUDA_MACHINE]
    if len(starts) != 1:
        raise ValueError(f"expected one CUDA image in the object file, found {len(starts)}")
    image = data[starts[0] :]
    programs, sections = struct.unpack_from("<QQ", image, 0x20)
    program_size, num_programs, section_size, num_sections = struct.unpack_from("<4H", image, 0x36)
    return image[: max(sections + section_size * num_sections, programs + program_size * num_programs)]


def _sections(image: bytes) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", image, 0x28)
    entry_size, count, names_index = struct.unpack_from("<3H", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, table + entry_size * i) for i in range(count)]
    names = headers[names_index][4]
    found = []
    for name, kind, _, _, offset, size, *_ in headers:
        end = image.index(b"\0", names + name)
        # Kind 8 has a size and no bytes.
        content = b"" if kind == 8 else image[offset : offset + size]
        found.append(_Section(image[names + name : end].decode(), size, content))
    return found


def _symbols(content: bytes, strings: bytes) -> list[str]:
    names = (struct.unpack_from("<I", content, position)[0] for position in range(0, len(content), 24))
    return [strings[name : strings.index(b"\0", name)].decode() for name in names]


def _numbers(content: bytes, attribute: int) -> dict[int, int]:
    """Records of one kind in .nv.info: number by index of the symbol."""
    found, position = {}, 0
    while position + 4 <= len(content):
        form, kind, length = struct.unpack_from("<BBH", content, position)
        position += 4
        if form != _SIZED_RECORD:
            continue
        if kind == attribute and length == 8:
            symbol, number = struct.unpack_from("<II", content, position)
            found[symbol] = number
        position += length
    return found


def nvdisasm() -> Path:
    """The disassembler of the installed triton.

    Raises:
        RuntimeError: triton is not installed, or has none.
    """
    spec = importlib.util.find_spec("triton")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    for root in roots:
        path = root / "backends" / "nvidia" / "bin" / "nvdisasm"
        if path.is_file():
            return path
    raise RuntimeError(f"no nvdisasm in {roots or 'any package'}: install the triton of versions.env (`make env`)")


def nvdisasm_version() -> str:
    """Such as V13.1.80."""
    text = subprocess.run([nvdisasm(), "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V\d+\.\d+\.\d+", text)
    if match is None:
        raise RuntimeError(f"{nvdisasm()} --version says no version: {text!r}")
    return match[0]


def dynamic_smem(host_code: str) -> int:
    """Bytes of dynamic shared memory that the host code's launch asks for.

    Args:
        host_code: text of the compiled function's IR.

    Raises:
        ValueError: there is no such launch, or its size is not a constant.
    """
    field = re.search(rf"(%\d+) = llvm\.getelementptr %\d+\[0, 2\] : .*{_LAUNCH_CONFIG}", host_code)
    if field is None:
        raise ValueError("no launch configuration in the host code; has the compiler's version changed?")
    behind = host_code[field.end() :]
    stored = re.search(rf"llvm\.store (%\d+), {field[1]} : i64", behind)
    if stored is None:
        raise ValueError("nothing is stored as the launch's dynamic shared memory; has the compiler's version changed?")
    before = host_code[: field.end() + stored.start()]
    constants = re.findall(rf"{stored[1]} = llvm\.mlir\.constant\((\d+) : i64\)", before)
    if not constants:
        raise ValueError("the launch's dynamic shared memory is no constant")
    return int(constants[-1])


def facts(cubin: bytes, host_code: str) -> Facts:
    """What a cubin with one kernel, and the host code that launches it, say.

    Raises:
        ValueError: the cubin has not exactly one kernel.
    """
    sections = {section.name: section for section in _sections(cubin)}
    kernels = [name.removeprefix(".nv.info.") for name in sections if name.startswith(".nv.info.")]
    if len(kernels) != 1:
        raise ValueError(f"expected one kernel in the cubin, found {kernels}")
    kernel = kernels[0]
    symbols = _symbols(sections[".symtab"].content, sections[".strtab"].content)
    index = max(i for i, name in enumerate(symbols) if name == kernel)
    info = sections[".nv.info"].content
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([nvdisasm(), "-c", file.name], capture_output=True, text=True, check=True).stdout
    shared = sections.get(f".nv.shared.{kernel}")
    return Facts(
        registers=_numbers(info, _REGISTERS)[index],
        static_smem=shared.size if shared else 0,
        dynamic_smem=dynamic_smem(host_code),
        stack=_numbers(info, _FRAME_SIZE)[index],
        local=len(re.findall(r"\b(?:STL|LDL)\b", text)),
        mma=len(re.findall(r"\b(?:UTCOMMA|HGMMA)\b", text)),
        instructions=sections[f".text.{kernel}"].size // _INSTRUCTION_BYTES,
    )


# ---- the document ---------------------------------------------------------------------------------------------------


def examine(variant: Variant) -> Facts:
    """Compiles a kernel and takes it apart."""
    function: Any = variant.compiled(variant.config, line_info=False)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.o"
        function.export_to_c(object_file_path=str(path), function_name="kernel")
        cubin = find_cubin(path.read_bytes())
    return facts(cubin, str(function.ir_module))


def closed_set(arch: str) -> list[Variant]:
    """Every kernel that a deployment of a published model can call on an architecture."""
    asked = [deployment.deployment(model, TP, arch) for model in deployment.MODELS.values()]
    found = [variant for each in asked for variant in deployment.variants(each)]
    unique = {(variant.kernel, variant.config): variant for variant in found}
    families = [family.kernel for family in deployment.FAMILIES]
    return sorted(unique.values(), key=lambda it: families.index(it.kernel.__name__))


def label(variant: Variant) -> str:
    """First cells of a kernel's row."""
    values = {name: value for name, value in asdict(variant.config).items() if name != "arch"}
    text = ", ".join(f"{name} {json.dumps(value)}".replace('"', "") for name, value in values.items())
    return f"| {variant.kernel.__module__.rpartition('.')[2]} | {text} |"


def row(variant: Variant, found: Facts) -> str:
    """A kernel's row."""
    cells = (
        found.registers, found.static_smem, found.dynamic_smem, found.stack, found.local, found.mma,
        found.instructions,
    )  # fmt: skip
    return f"{label(variant)} {' | '.join(map(str, cells))} |"


def document(rows: Mapping[str, Sequence[str]]) -> str:
    """The whole file, from the rows of each architecture."""
    sizes = ", ".join(map(str, TP))
    triton = importlib.metadata.version("triton")
    tools = f"CuTe DSL {compiler.dsl_version()}, nvdisasm {nvdisasm_version()} of triton {triton}"
    sections = "\n".join(_section(arch, rows[arch]) for arch in ARCHS)
    return f"""# Kernels, as compiled

What the machine code says of every kernel that a deployment of DeepSeek-V4 Pro or Flash can call, at any number of tokens
and tensor parallel sizes {sizes}. Static facts: nothing here is about speed, and sm_100a is not verified on hardware.
Written by `scripts/kernel_table.py`; `tests/sim/test_aot.py` holds it to the code.

{tools}.

- **registers** of a thread at the launch; in grouped_gemm_sm90 the warpgroup that loads then gives some to the others.
- **static**, **dynamic**: bytes of shared memory of a CTA (1024 static ones are the system's).
- **stack**: bytes of local memory of a thread; **local**: instructions that access it (STL, LDL). 0: nothing is spilled.
- **MMA**: instructions of the tensor core in the code; a loop executes each many times. They are block-scaled FP4 ones on
  Blackwell (UTCOMMA) and BF16 ones of a warpgroup on Hopper (HGMMA).
- **instructions** in all, of {_INSTRUCTION_BYTES} bytes each, with those that fill up the end.

{sections}"""


def _section(arch: str, rows: Sequence[str]) -> str:
    return f"""## {ARCHS[arch]}, {arch}: {len(rows)} kernels

| kernel | configuration | registers | static | dynamic | stack | local | MMA | instructions |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}
"""


def table(variants: Sequence[Variant], jobs: int) -> list[str]:
    """Rows of kernels, compiled in processes of their own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(variants)), context, _start_worker) as pool:
        return [row(variant, found) for variant, found in zip(variants, pool.map(examine, variants), strict=True)]


def _start_worker() -> None:
    for name in ("CUTE_DSL_LINEINFO", "CUTE_DSL_KEEP", compiler.NO_JIT):
        os.environ.pop(name, None)


def main() -> int:
    """Writes or checks docs/kernels.md; returns the exit code."""
    parser = argparse.ArgumentParser(description="Writes docs/kernels.md.")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where the file is out of date")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="processes, default one a core")
    arguments = parser.parse_args()
    text = document({arch: table(closed_set(arch), arguments.jobs) for arch in ARCHS})
    if arguments.check:
        if DOCUMENT.read_text(encoding="utf-8") != text:
            print(f"{DOCUMENT} is out of date: run scripts/kernel_table.py", file=sys.stderr)
            return 1
    else:
        DOCUMENT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
