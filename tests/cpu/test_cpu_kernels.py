"""The torch versions of two Triton kernels against those kernels, run by Triton's interpreter."""

import pytest
import torch
from vllm.v1.attention.backends.mla import sparse_swa
from vllm.v1.worker import utils as worker_utils
from vllm_nvfp4 import cpu_kernels

POISON = 0x5A5A5A5A


def swa_inputs(seed: int, queries: list[int], prefixes: list[int], padded: int, block_size: int = 64) -> dict:
    """A batch: for each request its new tokens and the length before them, and `padded` invalid tokens at the end."""
    g = torch.Generator().manual_seed(seed)
    num_tokens = sum(queries) + padded
    seq_lens = torch.tensor([q + p for q, p in zip(queries, prefixes, strict=True)], dtype=torch.int32)
    max_blocks = -(-int(seq_lens.max()) // block_size)
    request = torch.repeat_interleave(torch.arange(len(queries)), torch.tensor(queries))
    return {
        "query_start_loc": torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        "seq_lens": seq_lens,
        "token_to_req_indices": torch.cat([request, torch.zeros(padded, dtype=torch.long)]).to(torch.int32),
        "is_valid_token": torch.arange(num_tokens) < sum(queries),
        "block_table": torch.randperm(len(queries) * max_blocks, generator=g).reshape(len(queries), -1).to(torch.int32),
        "block_size": block_size,
        "replay_start": torch.zeros(len(queries) + 1, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("queries", "prefixes", "padded", "offset", "replay"),
    [
        ([1], [0], 0, 0, 0),
        ([5], [0], 0, 0, 0),
        ([1, 1, 1], [0, 127, 128], 2, 0, 0),
        ([3, 130], [700, 0], 0, 3, 0),
        ([2, 9], [200, 60], 4, 0, 150),
    ],
)
def test_swa_indices_equal_the_kernel(queries, prefixes, padded, offset, replay) -> None:
    inputs = swa_inputs(0, queries, prefixes, padded)
    inputs["replay_start"][:1] = replay
    num_tokens = sum(queries) + padded - offset
    window = 128
    results = []
    for call in ("kernel", "torch"):
        # One row more than is written, and a middle dimension as upstream's decode buffer has.
        indices = torch.full((num_tokens + 1, 1, window), POISON, dtype=torch.int32)
        lens = torch.full((num_tokens + 1,), POISON, dtype=torch.int32)
        shared = {"swa_indices": indices, "swa_lens": lens, "window_size": window, "index_width": window}
        if call == "torch":
            cpu_kernels.swa_indices_and_lens(
                None,
                **shared,
                left_visible=lens,
                right_visible=lens,
                **inputs,
                num_tokens=num_tokens,
                token_offset=offset,
            )
        else:
            launch_kernel(shared, inputs, num_tokens, offset)
        assert (indices[num_tokens:] == POISON).all()
        assert lens[num_tokens] == POISON
        results.append((indices[:num_tokens], lens[:num_tokens]))
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0], results[1][0])


def launch_kernel(shared: dict, inputs: dict, num_tokens: int, offset: int) -> None:
    """Upstream's Triton kernel, as its own launcher would start it."""
    sparse_swa._compute_swa_indices_and_lens_kernel[(num_tokens,)](
        shared["swa_indices"],
        shared["swa_indices"].stride(0),
        shared["swa_lens"],
        shared["window_size"],
        shared["index_width"],
        shared["swa_lens"],
        shared["swa_lens"],
        inputs["query_start_loc"],
        inputs["seq_lens"],
        inputs["token_to_req_indices"],
        inputs["is_valid_token"],
        inputs["block_table"],
        inputs["block_table"].stride(0),
        inputs["block_size"],
        inputs["replay_start"],
        offset,
        HAS_IMAGE=False,
        TRITON_BLOCK_SIZE=1024,
    )


def test_images_are_refused() -> None:
    inputs = swa_inputs(0, [1], [0], 0)
    out = torch.zeros(1, 128, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="vision"):
        cpu_kernels.swa_indices_and_lens(
            None, out, out[0], 128, 128, out, out, **inputs, num_tokens=1, token_offset=0, has_image=True
        )


def test_zeroing_touches_exactly_the_kernels_bytes() -> None:
    num_blocks, page = 6, 50
    caches = []
    for call in ("kernel", "torch"):
        cache = torch.full((num_blocks, 2, page), POISON, dtype=torch.int32)
        zeroer = object.__new__(worker_utils.KVBlockZeroer)
        zeroer.device = torch.device("cpu")
        # Two segments in each block of 2 * page elements; the second one's page is shorter than its room.
        zeroer._meta = (
            torch.tensor([cache.data_ptr(), cache.data_ptr() + page * 4], dtype=torch.uint64),
            torch.tensor([2 * page, 2 * page]),
            torch.tensor([page, page - 7]),
            1,
            64,
            2,
        )
        if call == "torch":
            cpu_kernels.zero_block_ids(zeroer, [1, 4])
        else:
            grid = (2, 2, 1)
            worker_utils._zero_kv_blocks_kernel[grid](*zeroer._meta[:3], torch.tensor([1, 4]), BLOCK_SIZE=64)
        caches.append(cache)
    assert torch.equal(caches[0], caches[1])
    assert int((caches[1] == 0).sum()) == 2 * (2 * page - 7)
    cpu_kernels.zero_block_ids(zeroer, [])
    assert torch.equal(caches[0], caches[1])
