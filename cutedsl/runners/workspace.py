"""Memory that chains of kernels share, and tables of equal groups, for every backend that launches kernels.

The hard part is memory that CUDA graphs can rely on. What passes from kernel to kernel lies in a `Workspace`, which all
runners of a kind on a device share, because layers run one after another. A call takes views of it; it grows to the
largest batch seen so far, but never during a capture, so that the largest batch must run once before the first capture.
A graph keeps using the buffers it was captured with: those are kept when the workspace grows.
"""

import functools
import math
from dataclasses import dataclass

import torch

from cutedsl.layout import TILE_ROWS, padded_shape


class Workspace:
    """Buffers by name on one device, each as large as the largest that was asked for.

    Whoever runs two runners of a kind at the same time, on two streams, must give one of them a workspace of its own: see
    `workspace`.

    Args:
        device: of the buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, torch.Tensor] = {}
        self._captured: set[str] = set()
        self._retired: list[torch.Tensor] = []

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A view of the buffer of that name, valid until the next `take` of the same name.

        Args:
            name: one name has one meaning: what is left of an earlier call are values of the same kind.
            dtype: of an element.
            shape: of the view.

        Returns:
            A contiguous tensor, 16-byte aligned; a buffer starts as zeros and then holds what was written last.

        Raises:
            RuntimeError: the buffer would have to grow while a graph is being captured.
        """
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        capturing = _capturing(self.device)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_bytes:
            if capturing:
                found = 0 if buffer is None else buffer.numel()
                raise RuntimeError(
                    f"workspace: buffer {name!r} has {found} bytes, {num_bytes} are needed, and a graph is being captured; "
                    "run the largest batch once before the first capture"
                )
            if buffer is not None and name in self._captured:
                self._retired.append(buffer)
                self._captured.discard(name)
            # Zeros, as scales of rows that nobody wrote are read, and must be numbers.
            # A tensor made in inference mode could not be written outside of it later.
            with torch.inference_mode(False):
                buffer = self._buffers[name] = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        if capturing:
            self._captured.add(name)
        return buffer[:num_bytes].view(dtype).view(shape)

    def compact(self, name: str, table: torch.Tensor) -> torch.Tensor:
        """A table as kernels take it: itself, or where its rows are strided, as the ops allow, a copy in that buffer."""
        if table.is_contiguous():
            return table
        return self.take(name, table.dtype, *table.shape).copy_(table)


@functools.cache
def workspace(kind: str, device: torch.device) -> Workspace:
    """The workspace that runners of a kind share on a device, unless `runner.chain.workspace` is set to another.

    Args:
        kind: linear, shared_expert, moe or wo_a: operators of different kinds may run at the same time.
        device: of the weights.
    """
    return Workspace(device)


@dataclass(frozen=True)
class Groups:
    """Where rows of groups lie, on the device; see the grouped GEMMs.

    Attributes:
        tile_expert: (P/128,) int32.
        padded_offset: (G + 1,) int32.
        count: (G,) int32.
        tokens: of the largest group, as far as the host can tell.
        constant: no kernel writes them.
        num_hit: groups that have tokens, as far as the host can tell; None: all.
    """

    tile_expert: torch.Tensor
    padded_offset: torch.Tensor
    count: torch.Tensor
    tokens: int
    constant: bool = False
    num_hit: int | None = None


def guess_tokens(num_tokens: int, top_k: int, num_experts: int) -> int:
    """Tokens of a large expert: 4/3 of the mean, at most all; a wider tile would be padding for most experts.

    Args:
        num_tokens: T, at least 1.
        top_k: choices of a token.
        num_experts: of all ranks.
    """
    mean = -(-num_tokens * top_k // num_experts)
    return min(num_tokens, -(-4 * mean // 3))


def large_group(num_tokens: int, top_k: int, num_experts: int) -> int:
    """Tokens of a large expert, two standard deviations above the mean: a tile of so many holds nearly every expert's.

    Args:
        num_tokens: T, at least 1.
        top_k: choices of a token.
        num_experts: of all ranks.

    Source: where experts are chosen evenly, counts are nearly Poisson distributed; measured on an H200 (docs/bench/sm90.md).
    """
    mean = -(-num_tokens * top_k // num_experts)
    return min(num_tokens, mean + 2 * math.isqrt(mean))


def expected_hit(num_tokens: int, top_k: int, num_experts: int, num_local: int) -> int:
    """Experts of a rank that have tokens, where experts are chosen evenly: the mean of their number, at least 1.

    Args:
        num_tokens: T, at least 1.
        top_k: choices of a token.
        num_experts: of all ranks.
        num_local: of this rank.
    """
    return max(1, round(num_local * (1 - (1 - min(top_k / num_experts, 1.0)) ** num_tokens)))


class EqualGroups:
    """Groups of the same number of rows, group g's from row g * (rows up to 128) on: tables, as a call makes nothing.

    Args:
        num_groups: G.
        device: of the tables.
    """

    def __init__(self, num_groups: int, device: torch.device) -> None:
        self.num_groups, self.device = num_groups, device
        # By tiles of a group: tile_expert, padded_offset, and a row of counts for each number of tokens in the last tile.
        self._tables: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def of(self, num_tokens: int) -> Groups:
        """The groups of num_tokens rows each, at least 1.

        Raises:
            RuntimeError: this many were never seen, and a graph is being captured.
        """
        num_tiles = padded_shape(num_tokens, 0)[0] // TILE_ROWS
        if num_tiles > len(self._tables):
            self._grow(num_tiles)
        tile_expert, padded_offset, counts = self._tables[num_tiles - 1]
        return Groups(tile_expert, padded_offset, counts[(num_tokens - 1) % TILE_ROWS], num_tokens, constant=True)

    def _grow(self, num_tiles: int) -> None:
        if _capturing(self.device):
            raise RuntimeError(
                f"equal_groups: the largest batch so far had {len(self._tables) * TILE_ROWS} rows, this one has more, and a "
                "graph is being captured; run the largest batch once before the first capture"
            )
        group = torch.arange(self.num_groups + 1, dtype=torch.int32, device=self.device)
        row = torch.arange(1, TILE_ROWS + 1, dtype=torch.int32, device=self.device)
        for tiles in range(len(self._tables) + 1, num_tiles + 1):
            counts = (row + (tiles - 1) * TILE_ROWS).repeat_interleave(self.num_groups).view(TILE_ROWS, -1)
            self._tables.append((group[:-1].repeat_interleave(tiles), group * (tiles * TILE_ROWS), counts))
        if self.device.type == "cuda":
            # Kernels read constants before they wait for others: see `cutedsl.kernels.hopper`.
            torch.cuda.current_stream(self.device).synchronize()


@functools.cache
def equal_groups(num_groups: int, device: torch.device) -> EqualGroups:
    """The tables that runners with so many groups share on a device."""
    return EqualGroups(num_groups, device)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
