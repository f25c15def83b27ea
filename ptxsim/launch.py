"""A kernel launch as the driver would receive it, and the checks the driver makes before anything runs.

The hard part is that the driver's refusals need a driver: shared memory beyond the opt-in limit, a cluster that does not
divide the grid, parameters that differ from the entry's list. All of them can be read from the launch and the PTX text,
of which only an entry's header is looked at here.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Source: CUDA C++ programming guide, technical specifications per compute capability (9.0 and 10.0 agree).
MAX_SHARED_BYTES = 227 * 1024
# Dynamic shared memory above this needs cudaFuncAttributeMaxDynamicSharedMemorySize.
DEFAULT_SHARED_BYTES = 48 * 1024
MAX_BLOCK_THREADS = 1024
MAX_BLOCK = (1024, 1024, 64)
MAX_GRID = (2**31 - 1, 65535, 65535)
# Without and with cudaFuncAttributeNonPortableClusterSizeAllowed.
MAX_PORTABLE_CLUSTER = 8
MAX_CLUSTER = 16
# Source: CUDA C++ programming guide, kernel parameters: 4 KiB before 12.1, 32764 bytes since on sm_70 and later.
MAX_PARAM_BYTES = 32764

LAUNCH = "launch"


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as the driver would receive it.

    Attributes:
        ptx: the module's text.
        entry: the kernel's name in it.
        grid: CTAs along x, y, z.
        block: threads along x, y, z.
        cluster: CTAs of a cluster along x, y, z.
        shared_bytes: dynamic shared memory of a CTA.
        params: one byte string per .param of the entry, in order, of exactly its size.
        attributes: launch and kernel attributes by name, absent if not set: "cooperative", "priority",
            "programmatic_stream_serialization", "cluster_scheduling_policy", "max_dynamic_shared_bytes",
            "shared_carveout", "nonportable_cluster".
    """

    ptx: str
    entry: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    shared_bytes: int = 0
    params: tuple[bytes, ...] = ()
    attributes: Mapping[str, int] = field(default_factory=dict)


class PtxHeaderError(ValueError):
    """The PTX text lacks the entry, or its header is of an unknown form."""


@dataclass(frozen=True)
class EntryHeader:
    """What a launch must agree with.

    Attributes:
        param_sizes: bytes of each .param, in order.
        reqntid: threads of .reqntid, missing dimensions 1; None if not given.
        maxntid: likewise of .maxntid.
        reqnctapercluster: CTAs of .reqnctapercluster, likewise.
        static_shared_bytes: of the .shared variables the entry refers to, with alignment in order of declaration.
    """

    param_sizes: tuple[int, ...]
    reqntid: tuple[int, int, int] | None
    maxntid: tuple[int, int, int] | None
    reqnctapercluster: tuple[int, int, int] | None
    static_shared_bytes: int


_PARAM = re.compile(r"\.param\s+(?P<qualifiers>(?:\.\w+\s+|\d+\s+)*?)\.(?P<type>[a-z]+\d+)\s+(?P<rest>[^,]*)")
_SHARED = re.compile(
    r"^\s*(?:\.visible\s+|\.weak\s+)*\.shared\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>[a-z]+\d+)\s+"
    r"(?P<name>[\w$%]+)(?P<dims>(?:\[\d+\])*)",
    re.MULTILINE,
)


def _type_bytes(name: str) -> int:
    match = re.fullmatch(r"[busf](8|16|32|64|128)", name)
    if not match:
        raise PtxHeaderError(f"type .{name} in the PTX text is unknown")
    return int(match[1]) // 8


def _param_size(declaration: str) -> int:
    match = _PARAM.fullmatch(declaration.strip())
    if not match:
        raise PtxHeaderError(f"parameter declaration {declaration.strip()!r} is of an unknown form")
    size = _type_bytes(match["type"])
    for count in re.findall(r"\[(\d+)\]", match["rest"]):
        size *= int(count)
    return size


def _directive(text: str, name: str) -> tuple[int, int, int] | None:
    match = re.search(rf"\.{name}\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", text)
    return (int(match[1]), int(match[2] or 1), int(match[3] or 1)) if match else None


def _body(ptx: str, start: int) -> str:
    """Text between the brace at `start` and the one that closes it. Comments and strings are gone already."""
    depth = 0
    for match in re.finditer(r"[{}]", ptx[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return ptx[start : start + match.end()]
    raise PtxHeaderError("an entry's braces are not balanced; is the PTX text cut off?")


@functools.lru_cache(maxsize=64)
def entry_header(ptx: str, entry: str) -> EntryHeader:
    """Read an entry's parameters, directives and static shared memory.

    Args:
        ptx: the module's text.
        entry: the kernel's name.

    Raises:
        PtxHeaderError: no such entry, or a declaration of unknown form.
    """
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", ptx, flags=re.DOTALL)
    match = re.search(rf"\.entry\s+{re.escape(entry)}\s*(?:\((?P<params>[^)]*)\))?(?P<directives>[^{{;]*)\{{", text)
    if not match:
        known = re.findall(r"\.entry\s+([\w$%]+)", text)
        raise PtxHeaderError(f"no entry {entry!r} in the PTX text, it has {known}")
    params = match["params"] or ""
    body = _body(text, match.end() - 1)
    return EntryHeader(
        param_sizes=tuple(_param_size(declaration) for declaration in params.split(",") if declaration.strip()),
        reqntid=_directive(match["directives"], "reqntid"),
        maxntid=_directive(match["directives"], "maxntid"),
        reqnctapercluster=_directive(match["directives"], "reqnctapercluster"),
        static_shared_bytes=_static_shared_bytes(text, body),
    )


def _static_shared_bytes(text: str, body: str) -> int:
    used = set(re.findall(r"[A-Za-z_$%][\w$]*", body))
    total = 0
    for match in _SHARED.finditer(text):
        if match["name"] in used:
            size = _type_bytes(match["type"])
            align = int(match["align"] or size)
            for count in re.findall(r"\[(\d+)\]", match["dims"]):
                size *= int(count)
            total = -(-total // align) * align + size
    return total


def check_launch(launch: Launch, header: EntryHeader | None = None) -> list[tuple[str, str]]:
    """Find what the driver would refuse, before anything runs.

    Args:
        launch: the launch.
        header: its entry's header; read from the PTX text if not given.

    Returns:
        (code, message) per fault; the code is always "launch". Empty if the launch is good.

    Raises:
        PtxHeaderError: the PTX text lacks the entry.
    """
    header = header or entry_header(launch.ptx, launch.entry)
    messages = [*_check_sizes(launch, header), *_check_shared(launch, header), *_check_cluster(launch, header)]
    return [(LAUNCH, message) for message in messages + _check_params(launch, header)]


def _product(values: tuple[int, int, int]) -> int:
    return values[0] * values[1] * values[2]


def _check_sizes(launch: Launch, header: EntryHeader) -> list[str]:
    messages = []
    threads = _product(launch.block)
    for what, values, limits in (("grid", launch.grid, MAX_GRID), ("block", launch.block, MAX_BLOCK)):
        if any(not 1 <= value <= limit for value, limit in zip(values, limits, strict=True)):
            messages.append(f"{what} {values}: each dimension must be in 1..{limits}")
    if threads > MAX_BLOCK_THREADS:
        messages.append(f"block {launch.block} has {threads} threads, at most {MAX_BLOCK_THREADS} are possible")
    if header.reqntid and launch.block != header.reqntid:
        messages.append(f"block {launch.block} differs from .reqntid {header.reqntid}")
    if header.maxntid and threads > _product(header.maxntid):
        messages.append(f"block {launch.block} has more threads than .maxntid {header.maxntid} allows")
    return messages


def _check_shared(launch: Launch, header: EntryHeader) -> list[str]:
    messages = []
    dynamic, static = launch.shared_bytes, header.static_shared_bytes
    if dynamic < 0 or dynamic + static > MAX_SHARED_BYTES:
        messages.append(
            f"{dynamic} bytes of dynamic and {static} of static shared memory: together at most {MAX_SHARED_BYTES}"
        )
    allowed = launch.attributes.get("max_dynamic_shared_bytes", DEFAULT_SHARED_BYTES - static)
    if dynamic > allowed:
        messages.append(
            f"{dynamic} bytes of dynamic shared memory, but the kernel's limit is {allowed}: set "
            "cudaFuncAttributeMaxDynamicSharedMemorySize"
        )
    return messages


def _check_cluster(launch: Launch, header: EntryHeader) -> list[str]:
    messages = []
    size = _product(launch.cluster)
    limit = MAX_CLUSTER if launch.attributes.get("nonportable_cluster") else MAX_PORTABLE_CLUSTER
    if any(value < 1 for value in launch.cluster):
        return [f"cluster {launch.cluster}: each dimension must be at least 1"]
    if size > limit:
        messages.append(
            f"cluster {launch.cluster} has {size} CTAs, at most {limit} are possible"
            + ("" if limit == MAX_CLUSTER else f" ({MAX_CLUSTER} with cudaFuncAttributeNonPortableClusterSizeAllowed)")
        )
    if any(g % c for g, c in zip(launch.grid, launch.cluster, strict=True)):
        messages.append(f"grid {launch.grid} is not a multiple of cluster {launch.cluster}")
    if header.reqnctapercluster and launch.cluster != header.reqnctapercluster:
        messages.append(f"cluster {launch.cluster} differs from .reqnctapercluster {header.reqnctapercluster}")
    return messages


def _check_params(launch: Launch, header: EntryHeader) -> list[str]:
    sizes = tuple(len(param) for param in launch.params)
    if len(sizes) != len(header.param_sizes):
        return [f"{len(sizes)} parameters given, {launch.entry} has {len(header.param_sizes)}"]
    messages = [
        f"parameter {i} has {given} bytes, {launch.entry} wants {wanted}"
        for i, (given, wanted) in enumerate(zip(sizes, header.param_sizes, strict=True))
        if given != wanted
    ]
    if sum(header.param_sizes) > MAX_PARAM_BYTES:
        messages.append(f"{sum(header.param_sizes)} bytes of parameters, at most {MAX_PARAM_BYTES} are possible")
    return messages
