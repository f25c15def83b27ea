"""Rows of gates and ups interleaved in place, and how much may be copied at a time while weights are prepared."""

import torch

# PyTorch keeps requests up to 1 MiB in a pool of their own. For more, up to 10 MiB, it takes 20 MiB from the GPU, which vLLM,
# while it loads, declares too large to be used again for less: each copy of such a size would take 20 MiB of its own, until
# the GPU is full (seen on an H200: 100 GB beside a model of 11).
CHUNK_BYTES = 1 << 20


def move_gate_up(stack: torch.Tensor, interleave: int, inverse: bool) -> None:
    """I gate rows and I up rows <-> `interleave` gate rows, as many up rows, ...; in place, of each matrix.

    Args:
        stack: (..., 2I, columns) contiguous, of any type - I a multiple of `interleave`.
        interleave: rows that stay together.
        inverse: from interleaved rows.

    Memory: CHUNK_BYTES, or a column, if that is more. Numerics: elements are moved.
    """
    if stack.element_size() == 1:
        stack = stack.view(torch.uint8)  # not every device copies every 8-bit type
    rows, columns = stack.shape[-2:]
    width = max(1, CHUNK_BYTES // (rows * stack.element_size()))
    for matrix in stack.view(-1, rows, columns).unbind(0):
        for part in matrix.split(width, dim=1):
            halves = (2, rows // (2 * interleave), interleave, part.shape[1])
            pairs = (halves[1], 2, *halves[2:])
            before, after = (pairs, halves) if inverse else (halves, pairs)
            part.view(after).copy_(part.clone(memory_format=torch.contiguous_format).view(before).transpose(0, 1))
