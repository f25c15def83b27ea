"""What machine code needs of a CPU: instructions assembled by hand, sections, and what cannot be told."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from iced_x86 import CpuidFeature

from cutedsl import cpu_features
from cutedsl.cpu_features import UndecidedError

SECTIONS = """
.section .rodata
.byte 0x0f, 0x38, 0xc8, 0xc1
.section .text
popcnt %rax, %rax
.section .other, "ax", @progbits
shlx %rax, %rbx, %rcx
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        pytest.param("", set(), id="nothing"),
        pytest.param("48 89 e5 c3", set(), id="mov rbp, rsp; ret"),
        pytest.param("f2 0f 58 c1 0f 28 c1 0f 48 c1", set(), id="addsd; movaps; cmovs: the baseline"),
        pytest.param("f3 0f 1e fa", set(), id="endbr64: a nop elsewhere"),
        pytest.param("66 0f 1f 44 00 00 90 f3 90 cc", set(), id="nops; pause; int3: padding"),
        pytest.param("0f 31 0f a2", set(), id="rdtsc; cpuid"),
        pytest.param("f2 0f d0 c1", {"pni"}, id="addsubps"),
        pytest.param("66 0f 3a 0f c1 04", {"ssse3"}, id="palignr"),
        pytest.param("66 0f 38 14 c1", {"sse4_1"}, id="blendvps"),
        pytest.param("f2 48 0f 38 f1 c1", {"sse4_2"}, id="crc32"),
        pytest.param("f3 48 0f b8 c1", {"popcnt"}, id="popcnt"),
        pytest.param("f3 48 0f bd c1", {"abm"}, id="lzcnt"),
        pytest.param("48 0f bd c1", set(), id="bsr"),
        pytest.param("f3 48 0f bc c1", {"bmi1"}, id="tzcnt"),
        pytest.param("c4 e2 f0 f7 c2", {"bmi1"}, id="bextr: VEX"),
        pytest.param("c4 e2 f1 f7 c2", {"bmi2"}, id="shlx: VEX"),
        pytest.param("48 0f 38 f0 01", {"movbe"}, id="movbe"),
        pytest.param("f0 48 0f c7 0f", {"cx16"}, id="lock cmpxchg16b"),
        pytest.param("c5 f4 58 c2", {"avx"}, id="vaddps ymm: VEX"),
        pytest.param("c5 f5 fe c2", {"avx2"}, id="vpaddd ymm: VEX"),
        pytest.param("c5 f1 fe c2", {"avx"}, id="vpaddd xmm: VEX"),
        pytest.param("c4 e2 75 b8 c2", {"fma"}, id="vfmadd231ps"),
        pytest.param("c4 e2 7d 13 c1", {"f16c"}, id="vcvtph2ps"),
        pytest.param("62 f1 74 48 58 c2", {"avx512f"}, id="vaddps zmm: EVEX"),
        pytest.param("62 f1 74 28 58 c2", {"avx512f", "avx512vl"}, id="vaddps ymm: EVEX"),
        pytest.param("62 f1 75 48 fc c2", {"avx512bw"}, id="vpaddb zmm: EVEX"),
        pytest.param("c5 f9 90 c1", {"avx512dq"}, id="kmovb: VEX, yet AVX-512"),
        pytest.param("62 f2 77 48 72 c2", {"avx512f", "avx512_bf16"}, id="vcvtne2ps2bf16 zmm"),
        pytest.param("0f 38 c8 c1", {"sha_ni"}, id="sha1nexte"),
        pytest.param("c5 f4 58 c2 f3 0f 1e fa f3 48 0f b8 c1", {"avx", "popcnt"}, id="several"),
    ],
)
def test_instructions_need(code: str, expected: set[str]) -> None:
    assert cpu_features.of_code(bytes.fromhex(code), 0, "a test") == expected


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("90 06", "no instruction begins at 0x1001 in a test"),
        ("90 62 f1 74 48", "no instruction begins at 0x1001 in a test"),
        ("0f 01 d0", "what `xgetbv` at 0x1000 in a test needs is not known"),
        ("90 0f c7 f0", "what `rdrand eax` at 0x1001 in a test needs is not known"),
    ],
)
def test_what_cannot_be_told(code: str, message: str) -> None:
    with pytest.raises(UndecidedError, match=f"^{message}$"):
        cpu_features.of_code(bytes.fromhex(code), 0x1000, "a test")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    (folder / "code.s").write_text(SECTIONS)
    command = ["cc", "-shared", "-nostdlib", "-Wl,-s", "code.s", "-o", "code.so"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "code.so"


def test_sections_with_code_count_and_no_others(library: Path) -> None:
    assert cpu_features.of_libraries([library]) == ["bmi2", "popcnt"]
    assert cpu_features.of_libraries([]) == []


def test_a_library_that_does_not_decode_is_named(library: Path, tmp_path: Path) -> None:
    # push es: no instruction in 64-bit code.
    content = library.read_bytes()
    shlx = bytes.fromhex("c4 e2 f9 f7 cb")
    assert content.count(shlx) == 1
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(content.replace(shlx, b"\x90\x90\x90\x90\x06"))
    with pytest.raises(UndecidedError, match=r"^no instruction begins at 0x[0-9a-f]+ in \.other of damaged\.so$"):
        cpu_features.of_libraries([library, damaged])


def test_a_library_without_sections_is_not_one_without_needs(library: Path, tmp_path: Path) -> None:
    content = bytearray(library.read_bytes())
    # e_shoff, and e_shentsize to e_shstrndx.
    content[0x28:0x30], content[0x3A:0x40] = bytes(8), bytes(6)
    bare = tmp_path / "bare.so"
    bare.write_bytes(content)
    with pytest.raises(UndecidedError, match=r"^bare\.so has no section with code$"):
        cpu_features.of_libraries([bare])


@pytest.mark.parametrize(
    ("module", "message"),
    [("iced_x86", "iced-x86 is not installed"), ("elftools.elf.elffile", "pyelftools is not installed")],
)
def test_without_the_packages(library: Path, module: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UndecidedError, match=message):
        cpu_features.of_libraries([library])


def test_another_machine(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(UndecidedError, match="code for aarch64 is not decoded"):
        cpu_features.of_libraries([library])


def test_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_features, "CPUINFO", tmp_path / "cpuinfo")
    cpu_features.CPUINFO.write_text("processor\t: 0\nflags\t\t: fpu vme sse4a pni avx abm\n\nflags\t\t: other\n")
    assert cpu_features.of_this_cpu() == ["abm", "avx", "fpu", "pni", "sse4a"]
    cpu_features.CPUINFO.write_text("processor\t: 0\nFeatures\t: fp asimd evtstrm\n")
    assert cpu_features.of_this_cpu() == ["asimd", "fp"]
    cpu_features.CPUINFO.write_text("processor\t: 0\n")
    assert cpu_features.of_this_cpu() == []


def test_every_feature_is_known_to_the_decoder_and_looked_for_on_a_cpu() -> None:
    names = [*cpu_features._FLAGS, *cpu_features._BASELINE]
    assert [name for name in names if not hasattr(CpuidFeature, name)] == []
    # A machine must be able to have what a manifest asks for.
    assert [flag for flag in cpu_features._FLAGS.values() if not flag.startswith(cpu_features._USABLE)] == []
    # Listed twice, a feature would be asked of a CPU by accident or not at all.
    assert not set(cpu_features._FLAGS) & set(cpu_features._BASELINE)
