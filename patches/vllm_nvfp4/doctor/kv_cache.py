"""vLLM 0.32's KV cache of DeepSeek-V4: how many blocks fit, and how many blocks a request takes.

The hard part is that a layer has up to five caches with different pages, and all of them share one pool of equal blocks:

    cache                      layers       page                                        tokens a page   kept
    sliding window (SWA)       all          64 tokens x 584 B                           64              last 128
    compressed, ratio r        r = 4, 128   256/r entries x 584 B                       256             all
    indexer keys               r = 4        64 entries x 132 B                          256             all
    compressor state, r = 4    r = 4        4 tokens x 4 * 512 fp32                     4               last 8
    its indexer's state        r = 4        4 tokens x 4 * 128 fp32                     4               last 8
    compressor state, r = 128  r = 128      8 tokens x 2 * 512 fp32                     8               last 128

each page rounded up to 576 B. 584 = 448 FP8 + 64 BF16 RoPE values + 8 scale bytes; 132 = 128 FP8 + one fp32 scale. Caches
that keep the same tokens in blocks of the same length form a group; a group is split where that makes blocks smaller. A block
is as large as the widest group, and a block of any group takes a whole one of the pool. So

    block_bytes = max over groups of the sum of its pages
    num_blocks = floor(available / block_bytes), one of which stays empty
    blocks(request) = sum over groups: ceil(context / 256) where all is kept,
                      else ceil(min(window - 1 + f, context) / block) + 1

with f = tokens in flight: max_num_batched_tokens for each batch that may be unsettled while a prompt is read (what vLLM
reserves and reports), one token for each while it decodes. The cost of a long context is block_bytes / 256 a token.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FULL_TOKENS = 256
SWA_TOKENS = 64
ENTRY_BYTES = 584
ALIGNMENT = 576
STATE_TOKENS = {4: 4, 128: 8}


@dataclass(frozen=True)
class Cache:
    """One layer's cache. window 0: all tokens are kept."""

    layer: int
    block_tokens: int
    window: int
    page_bytes: int

    @property
    def kind(self) -> tuple[int, int]:
        """Caches of one kind may share a group."""
        return self.block_tokens, self.window


@dataclass(frozen=True)
class Group:
    """Caches that are allocated together."""

    caches: tuple[Cache, ...]

    def page_bytes(self, layers: range | None = None) -> int:
        """Sum of the pages, of some layers or of all."""
        return sum(c.page_bytes for c in self.caches if layers is None or c.layer in layers)

    def blocks(self, context: int, in_flight: int) -> int:
        """Blocks that a request of `context` tokens holds with `in_flight` of them unsettled."""
        first = self.caches[0]
        if not first.window:
            return -(-context // first.block_tokens)
        kept = min(first.window - 1 + in_flight, context)
        return -(-kept // first.block_tokens) + 1


def caches(config: Any, mtp_layers: int = 0) -> list[Cache]:
    """Every cache of the model, in the order of its layers; MTP layers have only a sliding window.

    Raises: ValueError - the configuration's compress_ratios do not describe its layers.
    """
    ratios = list(config.compress_ratios or [])[: config.num_hidden_layers]
    if len(ratios) < config.num_hidden_layers:
        raise ValueError(f"compress_ratios has {len(ratios)} entries for {config.num_hidden_layers} layers")
    unknown = sorted({ratio for ratio in ratios if ratio not in (0, 1, *STATE_TOKENS)})
    if unknown:
        raise ValueError(f"compress_ratios holds {unknown}; vLLM's attention knows 0, 1, 4 and 128")
    found: list[Cache] = []
    for layer, ratio in enumerate(ratios + [0] * mtp_layers):
        found.append(_cache(layer, SWA_TOKENS, config.sliding_window, SWA_TOKENS * ENTRY_BYTES))
        if ratio <= 1:
            continue
        entries = FULL_TOKENS // ratio
        overlap = 2 if ratio == 4 else 1
        window, tokens = overlap * ratio, STATE_TOKENS[ratio]
        found.append(_cache(layer, FULL_TOKENS, 0, entries * ENTRY_BYTES))
        # Each token's state: a key and a score, `overlap` wide, in fp32.
        found.append(_cache(layer, tokens, window, tokens * 2 * overlap * config.head_dim * 4))
        if ratio == 4:
            key_bytes = config.index_head_dim + config.index_head_dim // 128 * 4
            found.append(_cache(layer, FULL_TOKENS, 0, entries * key_bytes))
            found.append(_cache(layer, tokens, window, tokens * 2 * overlap * config.index_head_dim * 4))
    return found


def _cache(layer: int, block_tokens: int, window: int, page_bytes: int) -> Cache:
    return Cache(layer, block_tokens, window, -(-page_bytes // ALIGNMENT) * ALIGNMENT)


def groups(found: Sequence[Cache]) -> list[Group]:
    """The groups that vLLM makes: one a kind, split so that the pages of all groups are about as wide.

    A kind is split by repeats: its layers' pages, one of each size, are the unit. A kind whose page sizes occur unequally
    often stays whole. If no kind mixes page sizes evenly, windows are split down to what the widest kind needs anyway.
    """
    kinds: dict[tuple[int, int], list[Cache]] = defaultdict(list)
    for cache in found:
        kinds[cache.kind].append(cache)
    if len({c.page_bytes for c in found}) <= 1 or len(kinds) == 1:
        return [Group(tuple(kind)) for kind in kinds.values()]
    by_size = [_by_page_size(kind) for kind in kinds.values()]
    balanced = [len({len(layers) for layers in sizes.values()}) == 1 for sizes in by_size]
    repeats = [max(len(layers) for layers in sizes.values()) for sizes in by_size]
    mixed = [r for r, sizes, even in zip(repeats, by_size, balanced, strict=True) if even and len(sizes) > 1]
    per_group = None
    if mixed:
        per_group = _least_padding([r for r, even in zip(repeats, balanced, strict=True) if even], max(mixed))
    made: list[Group] = []
    splits = [-(-r // per_group) if even and per_group else 1 for r, even in zip(repeats, balanced, strict=True)]
    if per_group is None:
        splits = _split_windows(list(kinds.values()), by_size)
    for kind, sizes, num_groups in zip(kinds.values(), by_size, splits, strict=True):
        if num_groups == 1:
            made.append(Group(tuple(kind)))
            continue
        rows = list(zip(*sizes.values(), strict=True))
        made += [Group(tuple(cache for row in rows[i::num_groups] for cache in row)) for i in range(num_groups)]
    return made


def _by_page_size(kind: Sequence[Cache]) -> dict[int, list[Cache]]:
    sizes: dict[int, list[Cache]] = defaultdict(list)
    for cache in kind:
        sizes[cache.page_bytes].append(cache)
    return sizes


def _least_padding(counts: Sequence[int], least: int) -> int:
    """The d >= least for which rounding all counts up to multiples of d adds least; the larger of equals."""
    return min(range(least, max(counts) + 1), key=lambda d: (sum(-count % d for count in counts), -d))


def _split_windows(kinds: Sequence[Sequence[Cache]], by_size: Sequence[dict[int, list[Cache]]]) -> list[int]:
    """Groups a kind: windows may shrink to a cache a group, but need not be narrower than the other kinds."""
    widths = [
        sum(page if kind[0].window else len(layers) * page for page, layers in sizes.items())
        for kind, sizes in zip(kinds, by_size, strict=True)
    ]
    anchor = max(widths)
    return [-(-len(kind) // max(anchor // kind[0].page_bytes, 1)) if kind[0].window else 1 for kind in kinds]


@dataclass(frozen=True)
class KvPlan:
    """What fits into `available_bytes` on one rank; requests are of `context` tokens each.

    reported_concurrency and reported_tokens are the numbers of vLLM's log, which reserve a whole batch in flight for every
    request. concurrent_requests lets only one request at a time read its prompt while the others decode, as the scheduler
    does. request_bytes is what a decoding request holds; startup_bytes is what vLLM demands before it starts.
    """

    available_bytes: int
    context: int
    block_bytes: int
    num_blocks: int
    num_groups: int
    request_blocks: int
    startup_blocks: int
    reported_concurrency: float
    reported_tokens: int
    concurrent_requests: int
    bytes_per_token: float

    @property
    def request_bytes(self) -> int:
        """Of a decoding request."""
        return self.request_blocks * self.block_bytes

    @property
    def startup_bytes(self) -> int:
        """For one request whose prompt is being read, and the block that stays empty."""
        return (self.startup_blocks + 1) * self.block_bytes

    @property
    def tokens(self) -> int:
        """Tokens of concurrent_requests requests."""
        return self.concurrent_requests * self.context

    def bytes_for(self, num_requests: int) -> int:
        """What `num_requests` at once need: one reads its prompt, the others decode."""
        return self.startup_bytes + (num_requests - 1) * self.request_bytes


def plan_kv(
    made: Sequence[Group],
    available_bytes: int,
    context: int,
    max_num_batched_tokens: int,
    num_batches: int = 2,
    layers: range | None = None,
) -> KvPlan:
    """The cache that fits into available_bytes (module docstring has the formulas).

    Args:
        made: groups of the whole model. layers: those of this pipeline stage, None for all.
        num_batches: batches that may be unsettled: 2 with asynchronous scheduling, 1 without, 1 more a pipeline stage.
    """
    block_bytes = max(group.page_bytes(layers) for group in made)
    num_blocks = max(available_bytes, 0) // block_bytes
    startup = sum(group.blocks(context, num_batches * max_num_batched_tokens) for group in made)
    decoding = sum(group.blocks(context, num_batches) for group in made)
    concurrent = 0 if num_blocks <= startup else 1 + (num_blocks - 1 - startup) // decoding
    per_token = block_bytes * sum(1 / g.caches[0].block_tokens for g in made if not g.caches[0].window)
    concurrency = num_blocks / startup
    return KvPlan(
        available_bytes=available_bytes,
        context=context,
        block_bytes=block_bytes,
        num_blocks=num_blocks,
        num_groups=len(made),
        request_blocks=decoding,
        startup_blocks=startup,
        reported_concurrency=concurrency,
        reported_tokens=int(concurrency * context),
        concurrent_requests=concurrent,
        bytes_per_token=per_token,
    )
