"""The features of a CPU that machine code needs, and those that this CPU has, by their names in /proc/cpuinfo.

A compiler that builds for the machine it runs on may use all of its CPU and uses little of it. What it did use is in the
instructions: iced-x86 decodes them and knows what each asks of a CPU, pyelftools finds the sections that hold them.

The hard part is not to miss a feature: the process would end in SIGILL, on another machine and long after the build. So
every byte of every executable section must decode, and an instruction must ask for something that is known here; else
UndecidedError says what stood in the way, and the caller asks for all that the building CPU has. Sections are decoded from
their first byte on, as they are what a compiler and a linker wrote: their padding is instructions too.
"""

import platform
from collections.abc import Iterable
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# What a compiler may use of a CPU, by the beginnings of Linux's names (x86-64, AArch64).
_USABLE = (
    "3dnowprefetch", "abm", "adx", "aes", "amx", "avx", "bmi", "cx16", "f16c", "fma", "gfni", "movbe", "pclmul", "pni",
    "popcnt", "sha", "sse", "ssse", "tbm", "vaes", "vpclmulqdq", "xop",
    "asimd", "atomics", "bf16", "dotprod", "fp", "i8mm", "lrcpc", "rcpc", "sve",
)  # fmt: skip
# iced-x86's names of what every x86-64 CPU has.
_BASELINE = (
    "INTEL8086", "INTEL186", "INTEL286", "INTEL386", "INTEL486", "X64", "CMOV", "CPUID", "CX8", "FPU", "FPU287", "FPU387",
    "FXSR", "MMX", "SSE", "SSE2", "SYSCALL", "TSC",
    # A CPU without control-flow enforcement takes endbr64 for a nop of several bytes, which every x86-64 CPU has, and one
    # before SSE2 took `pause` for a nop: none of the three can fail anywhere.
    "CET_IBT", "MULTIBYTENOP", "PAUSE",
)  # fmt: skip
# iced-x86's names of what compilers emit beyond that, and Linux's. Features that Linux does not show are left out, as no
# machine could be seen to have them.
_FLAGS = {
    "SSE3": "pni",
    "SSSE3": "ssse3",
    "SSE4_1": "sse4_1",
    "SSE4_2": "sse4_2",
    "SSE4A": "sse4a",
    "ADX": "adx",
    "AES": "aes",
    "BMI1": "bmi1",
    "BMI2": "bmi2",
    "CMPXCHG16B": "cx16",
    "F16C": "f16c",
    "FMA": "fma",
    "FMA4": "fma4",
    "GFNI": "gfni",
    "LZCNT": "abm",
    "MOVBE": "movbe",
    "PCLMULQDQ": "pclmulqdq",
    "POPCNT": "popcnt",
    "PREFETCHW": "3dnowprefetch",
    "SHA": "sha_ni",
    "TBM": "tbm",
    "VAES": "vaes",
    "VPCLMULQDQ": "vpclmulqdq",
    "XOP": "xop",
    "AVX": "avx",
    "AVX2": "avx2",
    "AVX_VNNI": "avx_vnni",
    "AVX512F": "avx512f",
    "AVX512BW": "avx512bw",
    "AVX512CD": "avx512cd",
    "AVX512DQ": "avx512dq",
    "AVX512VL": "avx512vl",
    "AVX512_BF16": "avx512_bf16",
    "AVX512_BITALG": "avx512_bitalg",
    "AVX512_FP16": "avx512_fp16",
    "AVX512_IFMA": "avx512ifma",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VBMI2": "avx512_vbmi2",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_VP2INTERSECT": "avx512_vp2intersect",
    "AVX512_VPOPCNTDQ": "avx512_vpopcntdq",
}


class UndecidedError(RuntimeError):
    """What machine code needs of a CPU cannot be told; the message says why, in a few words."""


def of_this_cpu() -> list[str]:
    """This CPU's features that machine code may depend on, sorted."""
    for line in CPUINFO.read_text().splitlines():
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return sorted(flag for flag in values.split() if flag.startswith(_USABLE))
    return []


def of_libraries(libraries: Iterable[Path]) -> list[str]:
    """What the code of shared objects needs beyond what every x86-64 CPU has, sorted.

    Args:
        libraries: ELF files for x86-64; data in them, such as a GPU's code, is not looked at.

    Raises:
        UndecidedError: as of_code; or this is no x86-64 machine, or a library has no code.
    """
    if platform.machine() != "x86_64":
        raise UndecidedError(f"code for {platform.machine()} is not decoded")
    try:
        from elftools.elf.constants import SH_FLAGS
        from elftools.elf.elffile import ELFFile
    except ImportError as error:
        raise UndecidedError("pyelftools is not installed") from error
    found: set[str] = set()
    for library in libraries:
        with library.open("rb") as file:
            sections = [part for part in ELFFile(file).iter_sections() if part["sh_flags"] & SH_FLAGS.SHF_EXECINSTR]
            if not sections:
                raise UndecidedError(f"{library.name} has no section with code")
            for section in sections:
                found |= of_code(section.data(), section["sh_addr"], f"{section.name} of {library.name}")
    return sorted(found)


def of_code(code: bytes, address: int, place: str) -> set[str]:
    """What x86-64 instructions need beyond what every x86-64 CPU has.

    Args:
        code: whole instructions, one behind the other.
        address: of the first, for messages.
        place: what the code is, for messages.

    Raises:
        UndecidedError: iced-x86 is not installed, a byte begins no instruction, or an instruction needs what is not
            known here.
    """
    try:
        from iced_x86 import CpuidFeature, Decoder
    except ImportError as error:
        raise UndecidedError("iced-x86 is not installed") from error
    known = {getattr(CpuidFeature, name): flag for name, flag in _FLAGS.items()}
    baseline = {getattr(CpuidFeature, name) for name in _BASELINE}
    found: set[str] = set()
    for instruction in Decoder(64, code, ip=address):
        if instruction.is_invalid:
            raise UndecidedError(f"no instruction begins at {instruction.ip:#x} in {place}")
        for feature in instruction.cpuid_features():
            if feature in known:
                found.add(known[feature])
            elif feature not in baseline:
                raise UndecidedError(f"what `{instruction}` at {instruction.ip:#x} in {place} needs is not known")
    return found
