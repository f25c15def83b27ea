"""Two of vLLM's Triton kernels in plain torch, for CPUs: in Triton's interpreter they took nine tenths of a prefill.

Measured with cProfile on a prompt of 600 tokens, 2 cores: 56 of 74 s in `_zero_kv_blocks_kernel`, 17 s in
`_compute_swa_indices_and_lens_kernel`, 0.5 s in the model itself.
Upstream: v1/worker/utils.py:60 and v1/attention/backends/mla/sparse_swa.py:1042. Remove when: Triton's CPU backend compiles,
or vLLM registers CPU versions (triton_utils/dispatcher.py) for these two.
"""

import ctypes
from typing import Any

import torch
from vllm.v1.attention.backends.mla.sparse_swa import ComputeSWAIndicesAndLensKernel
from vllm.v1.worker.utils import KVBlockZeroer

ELEMENT_BYTES = 4  # upstream counts its strides and page sizes in int32


def zero_block_ids(self: Any, block_ids: list[int]) -> None:
    """Zero the KV-cache memory of blocks: every segment's page at address + id * stride."""
    if not block_ids or self._meta is None:
        return
    addresses, strides, page_sizes, *_ = self._meta
    for address, stride, page in zip(addresses.tolist(), strides.tolist(), page_sizes.tolist(), strict=True):
        for block_id in block_ids:
            ctypes.memset(address + block_id * stride * ELEMENT_BYTES, 0, page * ELEMENT_BYTES)


def swa_indices_and_lens(
    self: Any,
    swa_indices: torch.Tensor,
    swa_lens: torch.Tensor,
    window_size: int,
    index_width: int,
    left_visible: torch.Tensor,
    right_visible: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    token_to_req_indices: torch.Tensor,
    is_valid_token: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    replay_start: torch.Tensor,
    *,
    num_tokens: int,
    token_offset: int,
    has_image: bool = False,
) -> None:
    """For each token, the cache slots of its sliding window and their number; -1 behind them and for padded tokens.

    Args:
        swa_indices: (>= num_tokens, ..., index_width) int32, written. swa_lens: (>= num_tokens,) int32, written.
        query_start_loc: (R + 1,) int32. seq_lens, replay_start: (>= R,) int32. token_to_req_indices, is_valid_token: (T,).
        block_table: (R, max_blocks) int32 - physical block of each logical block of a request.
    Raises: NotImplementedError - image spans, which the CPU model has not.
    """
    if has_image:
        raise NotImplementedError("DeepSeek-V4's vision variant has no CPU path in vLLM 0.32.0")
    rows = slice(token_offset, token_offset + num_tokens)
    request = token_to_req_indices[rows].long()
    valid = is_valid_token[rows]
    query_start, query_end = query_start_loc[request], query_start_loc[request + 1]
    token = torch.arange(token_offset, token_offset + num_tokens, device=request.device)
    position = seq_lens[request] - (query_end - query_start) + token - query_start
    start = torch.maximum((position - (window_size - 1)).clamp(min=0), replay_start[request])
    length = position + 1 - start
    offset = torch.arange(index_width, device=request.device)
    inside = (offset < length[:, None]) & valid[:, None]
    absolute = start[:, None] + offset
    # Columns outside the window may lie beyond the table; what is read there is discarded.
    logical = (absolute // block_size).clamp(0, block_table.shape[1] - 1)
    slots = block_table[request].gather(1, logical) * block_size + absolute % block_size
    target = torch.as_strided(swa_indices, (num_tokens, index_width), (swa_indices.stride(0), 1))
    target.copy_(torch.where(inside, slots, -1))
    swa_lens[:num_tokens] = torch.where(valid, length, 0).to(swa_lens.dtype)


def install() -> None:
    """Put both in place of the launches; a second call changes nothing."""
    KVBlockZeroer.zero_block_ids = zero_block_ids
    ComputeSWAIndicesAndLensKernel.__call__ = swa_indices_and_lens
