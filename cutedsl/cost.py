"""What a launch of a Blackwell GEMM moves and multiplies, counted from its shape: no GPU, no simulator, and no time.

The hard part is that bytes mean three things. A kernel *requests* boxes of TMA and stores: what passes between L2 and the
SMs, the same bytes as often as tiles read them, and zeros where a box reaches beyond a tensor. Of these, *unique* bytes are
what memory must deliver or take at least once: a kernel whose re-reads all hit L2 moves no more. The *minimum* is what the
shape itself has: every code, scale and result of a real row once, and weights only of groups that have rows.

    requested >= unique >= minimum        executed FLOPs >= FLOPs of the shape

unique / minimum and executed / needed FLOPs are padding; requested / unique are re-reads, which tiling has always.
tests/sim/test_cost.py holds requested bytes, unique bytes and FLOPs to what the simulator counts, for every kernel.

Left out everywhere: what a thread loads itself, which is alpha (4 bytes for a weight row or less), second quantizers'
scales, and tables of tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from cutedsl.formats import NVFP4
from cutedsl.layout import TILE_BYTES, TILE_COLUMNS, TILE_ROWS

# What follows a GEMM's sums; the same names as in the kernels, which import the compiler.
BF16, SWIGLU, SWIGLU_NVFP4 = "bf16", "swiglu", "swiglu_nvfp4"

# Of all GEMM kernels: rows on the MMA's M, what a step of K loads, and K of an MMA: those behind k are not executed.
TILE_M = 128
TILE_K = 256
MMA_K = 64
_STEP_TILES = TILE_K // (TILE_COLUMNS * NVFP4.block_size)


@dataclass(frozen=True)
class Cost:
    """Bytes and FLOPs of launches; a sum of costs is the cost of all.

    Attributes:
        tma_load_bytes: of whole boxes, as often as they are loaded.
        tma_store_bytes: of whole boxes.
        st_bytes: of stores by threads.
        unique_load_bytes, unique_store_bytes: different bytes of global memory among them.
        min_load_bytes, min_store_bytes: of real rows, and of the weights that they need.
        flops, min_flops: 2 for a multiply-add.
    """

    tma_load_bytes: int = 0
    tma_store_bytes: int = 0
    st_bytes: int = 0
    unique_load_bytes: int = 0
    unique_store_bytes: int = 0
    min_load_bytes: int = 0
    min_store_bytes: int = 0
    flops: int = 0
    min_flops: int = 0

    @property
    def requested(self) -> int:
        """Bytes that pass between L2 and the SMs, zeros of TMA counted."""
        return self.tma_load_bytes + self.tma_store_bytes + self.st_bytes

    @property
    def unique(self) -> int:
        """Different bytes of global memory that are read or written."""
        return self.unique_load_bytes + self.unique_store_bytes

    @property
    def minimum(self) -> int:
        """Bytes that the shape has."""
        return self.min_load_bytes + self.min_store_bytes

    def __add__(self, other: "Cost") -> "Cost":
        """The cost of both."""
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: int) -> "Cost":
        """The cost of so many launches."""
        return Cost(*(getattr(self, field.name) * times for field in fields(self)))


def linear(m: int, n: int, k: int, tile_n: int) -> Cost:
    """A launch of `linear_sm100`.

    Args:
        m, n, k: rows, weight rows, columns.
        tile_n: of the configuration.
    """
    tiles = _ceil(m, TILE_M) * _ceil(n, tile_n)
    steps = tiles * _ceil(k, TILE_K)
    return Cost(
        tma_load_bytes=steps * _stage_bytes(TILE_M, tile_n, _up(tile_n, TILE_ROWS)),
        tma_store_bytes=tiles * TILE_M * tile_n * 2,
        unique_load_bytes=_matrix_bytes(m, k) + _matrix_bytes(n, k),
        unique_store_bytes=m * n * 2,
        flops=2 * tiles * TILE_M * tile_n * _up(k, MMA_K),
        **_minimum((m,), n, k, BF16),
    )


def grouped(
    counts: Sequence[int], n: int, k: int, epilogue: str, tile_n: int, cta_group: int, num_rows: int | None = None
) -> Cost:
    """A launch of `grouped_gemm_sm100`.

    Args:
        counts: rows of each group.
        n, k: weight rows of a group, columns.
        epilogue: BF16, SWIGLU or SWIGLU_NVFP4.
        tile_n, cta_group: of the configuration.
        num_rows: of A with all padding; None: as many as the groups take up.
    """
    experts = [expert for expert, count in enumerate(counts) for _ in range(_ceil(count, TILE_M))]
    row_tiles = len(experts)
    pairs = [experts[i : i + cta_group] for i in range(0, row_tiles, cta_group)]
    # A pair of row tiles that have two experts works twice.
    passes = sum(len(set(pair)) for pair in pairs) * _ceil(n, tile_n)
    steps = passes * _ceil(k, TILE_K)
    # The second CTA of the last pair may have no row tile, and loads what is there.
    touched = row_tiles if num_rows is None else min(len(pairs) * cta_group, num_rows // TILE_M)
    d_bytes = {BF16: 2 * tile_n, SWIGLU: tile_n, SWIGLU_NVFP4: tile_n // 4}[epilogue]
    st_bytes = row_tiles * TILE_M * _sfd_columns(n, epilogue)
    return Cost(
        tma_load_bytes=steps * cta_group * _stage_bytes(TILE_M, tile_n // cta_group, _up(tile_n, TILE_ROWS)),
        tma_store_bytes=row_tiles * TILE_M * _ceil(n, tile_n) * d_bytes,
        st_bytes=st_bytes,
        unique_load_bytes=_matrix_bytes(touched * TILE_M, k) + _active(counts) * _matrix_bytes(n, k),
        unique_store_bytes=row_tiles * TILE_M * _d_bytes(n, epilogue) + st_bytes,
        flops=2 * passes * cta_group * TILE_M * tile_n * _up(k, MMA_K),
        **_minimum(counts, n, k, epilogue),
    )


def swapped(counts: Sequence[int], n: int, k: int, epilogue: str, tile_n: int, num_rows: int | None = None) -> Cost:
    """A launch of `grouped_gemm_swap_sm100`.

    Args:
        counts: rows of each group.
        n, k: weight rows of a group, columns.
        epilogue: BF16, SWIGLU or SWIGLU_NVFP4.
        tile_n: tokens of a tile.
        num_rows: of X with all padding, the groups' up to multiples of 128; fewer if the last one ends there.
    """
    tiles = sum(_ceil(count, tile_n) for count in counts) * _ceil(n, TILE_M)
    steps = tiles * _ceil(k, TILE_K)
    # Rows of X in a tile, of which the last ones may be no tokens; and scale tiles, whole because tiles begin with them.
    offset, rows, sf_rows = 0, 0, 0
    for count in counts:
        end = offset + _up(count, tile_n)
        rows += (end if num_rows is None else min(end, num_rows)) - offset
        sf_rows += _up(count, TILE_ROWS)
        offset += _up(count, TILE_ROWS)
    st_bytes = sum(counts) * (_d_bytes(n, epilogue) + _sfd_columns(n, epilogue))
    return Cost(
        tma_load_bytes=steps * _stage_bytes(TILE_M, tile_n, TILE_ROWS),
        st_bytes=st_bytes,
        unique_load_bytes=_code_bytes(rows, k) + _sf_bytes(sf_rows, k) + _active(counts) * _matrix_bytes(n, k),
        unique_store_bytes=st_bytes,
        flops=2 * tiles * TILE_M * tile_n * _up(k, MMA_K),
        **_minimum(counts, n, k, epilogue),
    )


def _minimum(counts: Sequence[int], n: int, k: int, epilogue: str) -> dict[str, int]:
    """Returns what any kernel of these sizes must move and multiply: no padding of rows, tiles or scales."""
    rows = sum(counts)
    blocks = n // (2 * NVFP4.block_size) if epilogue == SWIGLU_NVFP4 else 0
    row_bytes = k // NVFP4.codes_per_byte + k // NVFP4.block_size
    return {
        "min_load_bytes": (rows + _active(counts) * n) * row_bytes,
        "min_store_bytes": rows * (_d_bytes(n, epilogue) + blocks),
        "min_flops": 2 * rows * n * k,
    }


def _stage_bytes(rows_a: int, rows_b: int, rows_sfb: int) -> int:
    """Returns what one step of K loads: codes of A and B, scales of 128 rows of A and of rows_sfb rows of B."""
    codes = (rows_a + rows_b) * TILE_K // NVFP4.codes_per_byte
    return codes + (TILE_ROWS + rows_sfb) // TILE_ROWS * _STEP_TILES * TILE_BYTES


def _matrix_bytes(rows: int, k: int) -> int:
    """Returns the bytes of a packed matrix as it is stored: codes, and whole scale tiles."""
    return _code_bytes(rows, k) + _sf_bytes(rows, k)


def _code_bytes(rows: int, k: int) -> int:
    return rows * k // NVFP4.codes_per_byte


def _sf_bytes(rows: int, k: int) -> int:
    return _ceil(rows, TILE_ROWS) * _ceil(k, TILE_COLUMNS * NVFP4.block_size) * TILE_BYTES


def _d_bytes(n: int, epilogue: str) -> int:
    """Returns the bytes of a row of D, without block scales."""
    return {BF16: 2 * n, SWIGLU: n, SWIGLU_NVFP4: n // 4}[epilogue]


def _sfd_columns(n: int, epilogue: str) -> int:
    """Returns the block scales of a row of D, with the padding of the last scale tile, which is written too."""
    return _up(n // (2 * NVFP4.block_size), TILE_COLUMNS) if epilogue == SWIGLU_NVFP4 else 0


def _active(counts: Sequence[int]) -> int:
    return sum(count > 0 for count in counts)


def _ceil(size: int, unit: int) -> int:
    return -(-size // unit)


def _up(size: int, unit: int) -> int:
    return _ceil(size, unit) * unit
