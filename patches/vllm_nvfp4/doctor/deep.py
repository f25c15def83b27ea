"""`--deep`: every byte of the weights, for what no header and no scale can tell.

NVFP4 codes are counted by pairs (a byte), which is enough: a matrix of zeros has only the bytes 00, 08, 80, 88, and clipped
weights pile up at the codes of 6.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from vllm_nvfp4 import names
from vllm_nvfp4.checkpoint import Tensor
from vllm_nvfp4.doctor import ranges
from vllm_nvfp4.doctor.findings import Finding, grouped, make
from vllm_nvfp4.inventory import Format

# Of 16 codes in a block one is at 6 by construction, of normally distributed weights one in 12; random bytes have one in 8.
MAX_SATURATED = 0.25
SCALES = frozenset({"weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale"})
NIBBLES = np.stack([np.arange(256) & 15, np.arange(256) >> 4])
# How many zero codes, and codes of magnitude 6, are in a byte.
ZEROS = ((NIBBLES & 7) == 0).sum(0)
LARGEST = ((NIBBLES & 7) == 7).sum(0)


def check(
    tensors: Mapping[str, Tensor], by_canonical: Mapping[str, str], formats: Mapping[str, Format], num_experts: int
) -> tuple[list[Finding], dict[str, Any]]:
    """Findings in all weights, and totals: bytes read and the share of each NVFP4 code index."""
    codes, others = {}, {}
    for canonical, name in by_canonical.items():
        module, _, leaf = canonical.rpartition(".")
        expert = names.parse_expert(canonical)
        form = formats.get(f"{expert.layer}.ffn.experts" if expert else module)
        if leaf == "weight" and form is Format.NVFP4 and tensors[name].dtype == torch.uint8:
            codes[name] = tensors[name]
        elif tensors[name].dtype in _NOT_FINITE and leaf not in SCALES:
            others[name] = tensors[name]
    findings: list[Finding] = []
    total = _check_codes(codes, findings)
    _check_finite(others, findings)
    tables = {n: tensors[n] for c, n in by_canonical.items() if c.endswith(".tid2eid")}
    _check_tables(tables, num_experts, findings)
    num_bytes = sum(t.num_bytes for t in (*codes.values(), *others.values(), *tables.values()))
    shares = {f"{i:x}": float((np.equal(NIBBLES, i).sum(0) * total).sum() / max(2 * total.sum(), 1)) for i in range(16)}
    return findings, {"bytes_read": num_bytes, "code_shares": shares if codes else {}}


def _reduced(
    tensors: Mapping[str, Tensor], reduce: Callable[[ranges.Bytes], Any], findings: list[Finding]
) -> dict[str, Any]:
    """reduce() of each tensor's bytes, summed over its ranges."""
    found: dict[str, Any] = {}
    for done in ranges.reduce_all((r for n, t in tensors.items() for r in ranges.whole(n, t)), reduce):
        name = done.range.name
        if done.result is None:
            findings.append(make("FILE_UNREADABLE", done.range.file.name, f"{done.error} (at {name})"))
        else:
            found[name] = found[name] + done.result if name in found else done.result
    return found


def _check_codes(tensors: Mapping[str, Tensor], findings: list[Finding]) -> Any:
    """Matrices of zeros and clipped matrices; the histogram of all bytes."""
    total = np.zeros(256, dtype=np.int64)
    zero, saturated = [], []
    for name, histogram in _reduced(tensors, ranges.histogram, findings).items():
        total += histogram
        num_codes = 2 * int(histogram.sum())
        share = int((histogram * LARGEST).sum()) / num_codes
        if int((histogram * ZEROS).sum()) == num_codes:
            zero.append((name, f"all {num_codes} codes are 0"))
        elif share > MAX_SATURATED:
            saturated.append((name, f"{share:.1%} of {num_codes} codes are 6 or -6"))
    findings += grouped("WEIGHT_ZERO", zero)
    findings += grouped("WEIGHT_SATURATED", saturated)
    return total


def _exponents_full(dtype: str, mask: int) -> Callable[[ranges.Bytes], int]:
    """How many numbers have all exponent bits set: NaN and infinity."""
    return lambda raw: int(((raw.view(dtype) & mask) == mask).sum())


_NOT_FINITE: dict[torch.dtype, Callable[[ranges.Bytes], int]] = {
    torch.bfloat16: _exponents_full("<u2", 0x7F80),
    torch.float16: _exponents_full("<u2", 0x7C00),
    torch.float32: _exponents_full("<u4", 0x7F800000),
    # E4M3 has no infinity: the one NaN is all seven bits.
    torch.float8_e4m3fn: _exponents_full("u1", 0x7F),
}


def _check_finite(tensors: Mapping[str, Tensor], findings: list[Finding]) -> None:
    """NaN and infinity in what is not packed; global scales have been looked at."""
    for dtype, count in _NOT_FINITE.items():
        of_type = {n: t for n, t in tensors.items() if t.dtype == dtype and t.shape}
        found = _reduced(of_type, count, findings)
        findings += grouped(
            "WEIGHT_NOT_FINITE", [(n, f"{bad} values are NaN or infinite") for n, bad in found.items() if bad]
        )


def _check_tables(tensors: Mapping[str, Tensor], num_experts: int, findings: list[Finding]) -> None:
    """Expert numbers of the hash router."""
    for dtype, view in ((torch.int32, "<i4"), (torch.int64, "<i8")):
        of_type = {n: t for n, t in tensors.items() if t.dtype == dtype}

        def outside(raw: ranges.Bytes, view: str = view) -> int:
            ids = raw.view(view)
            return int(((ids < 0) | (ids >= num_experts)).sum())

        hits = [(n, bad) for n, bad in _reduced(of_type, outside, findings).items() if bad]
        findings += grouped(
            "ROUTER_TABLE", [(n, f"{bad} entries are no expert of 0 to {num_experts - 1}") for n, bad in hits]
        )
