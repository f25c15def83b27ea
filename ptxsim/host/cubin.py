"""Reads the parameter sizes of a kernel from machine code, to notice PTX text of another compile.

Only the ELF section `.nv.info.<kernel>` is looked at. Neither its records nor the fat binary around it are documented: both
were read off what CuTe DSL emits for sm_90a and sm_100a, next to the PTX text of the same kernels.
"""

import ctypes
import struct

_FAT_BINARY = bytes.fromhex("50ed55ba")
# Kind of an entry of a fat binary; 1 is PTX text.
_MACHINE_CODE = 2
_SIZED_RECORD = 4
# EIATTR_KPARAM_INFO: index u32, ordinal u16, offset u16, then a word with the size from bit 18 on.
_PARAMETER_RECORD = 0x17


def read_image(address: int) -> bytes | None:
    """The machine code that `cudaLibraryLoadData` is given.

    Args:
        address: of a cubin or of a fat binary in this process.

    Returns:
        The first cubin in it, or None if there is none that can be read (a compressed one cannot).
    """
    if ctypes.string_at(address, 4) == _FAT_BINARY:
        version, header_size, size = struct.unpack("<HHQ", ctypes.string_at(address + 4, 12))
        position, end = address + header_size, address + header_size + size
        while version == 1 and position < end:
            kind, _, entry_header_size, payload_size = struct.unpack("<HHIQ", ctypes.string_at(position, 16))
            if kind == _MACHINE_CODE:
                return _read_elf(position + entry_header_size)
            position += entry_header_size + payload_size
        return None
    return _read_elf(address)


def _read_elf(address: int) -> bytes | None:
    header = ctypes.string_at(address, 64)
    if header[:5] != b"\x7fELF\x02":
        return None
    (program_table, section_table) = struct.unpack_from("<QQ", header, 0x20)
    program_size, program_count, section_size, section_count = struct.unpack_from("<4H", header, 0x36)
    end = max(section_table + section_size * section_count, program_table + program_size * program_count)
    return ctypes.string_at(address, end)


def parameter_sizes(image: bytes, kernel: str) -> tuple[int, ...] | None:
    """Sizes of a kernel's parameters in order.

    Args:
        image: a cubin.
        kernel: its entry.

    Returns:
        Bytes of each parameter, or None if the image says nothing about the kernel's parameters.
    """
    section = _section(image, f".nv.info.{kernel}")
    if section is None:
        return None
    sizes: dict[int, int] = {}
    position = 0
    while position + 4 <= len(section):
        form, attribute, length = struct.unpack_from("<BBH", section, position)
        position += 4
        if form != _SIZED_RECORD:
            continue
        if attribute == _PARAMETER_RECORD and length == 12:
            _, ordinal, _, word = struct.unpack_from("<IHHI", section, position)
            sizes[ordinal] = word >> 18
        position += length
    if sorted(sizes) != list(range(len(sizes))):
        return None
    return tuple(sizes[i] for i in range(len(sizes))) if sizes else None


def _section(image: bytes, name: str) -> bytes | None:
    table = struct.unpack_from("<Q", image, 0x28)[0]
    entry_size, count, names_index = struct.unpack_from("<3H", image, 0x3A)
    entries = [struct.unpack_from("<IIQQQQ", image, table + i * entry_size) for i in range(count)]
    names_offset = entries[names_index][4]
    for name_offset, _, _, _, offset, size in entries:
        start = names_offset + name_offset
        if image[start : image.index(b"\0", start)].decode() == name:
            return image[offset : offset + size]
    return None
