"""Routing on Blackwell: the router's choices sorted by expert, and where every row goes, in one launch.

A *choice* is a place in the flattened (T, top_k) table of ids, a *slot* a place after a stable sort by expert, a *padded
row* a slot's row in buffers where each expert starts at a multiple of 128 (`cutedsl.layout`). Ids become *bins*: bin e is
expert e of this rank, bin E all choices that have no expert here; their slots come last.

The hard part is that a slot depends on every choice before it, that a launch has no barrier over all CTAs without
being cooperative, and that the result must not depend on who comes first. So this is a counting sort by a single
cluster, whose CTAs can meet and can read each other's shared memory. The order is carried by ranges, not by atomics:
each warp owns one contiguous range of choices, ranges ascend with the warp's rank in the cluster, and

    slot = choices in lower bins + choices in this bin by lower warps + choices in this bin earlier in this warp's range
           (scan over bins)        (sum over CTAs and warps)            (a counter and match.any among 32 lanes)

Each warp walks its range twice: to count, then, when all counts are known, to hand out slots. Only the warp itself writes
its counters, so no step is atomic and the order is stable. A thread stands for each bin in the sums and scans between.
Every CTA repeats the scan over bins from all CTAs' counts; the counts of the CTAs are all that crosses between SMs.

Rejected: one CTA for each slice of experts, reading all ids: it must still count every choice to know where its slots
begin, so no CTA is done before a single CTA would be. Global atomics or a chain of CTAs: workspaces to clear, and waiting
for CTAs that need not be running. A small batch gets a cluster of one CTA: it meets nobody.

Nothing here is of Blackwell alone: `route_sm90` is this kernel too.

Names: mIds, mSlotToken, ... global tensors; sCount, ... shared memory; bin, slot, tile as above.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import cutlass
import torch
from cutlass import cute, memory
from cutlass._mlir.dialects import llvm
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from cutedsl import compile as compiler
from cutedsl.kernels.blackwell import ARCHS, WARP
from cutedsl.layout import TILE_ROWS, max_padded_rows
from cutedsl.ops import registry

MAX_EXPERTS = 512
MAX_TOP_K = 16
# A thread for each bin: the experts, one for choices without expert, one for lanes behind the last choice; whole warps.
WARPS = MAX_EXPERTS // WARP + 1
THREADS = WARPS * WARP
# Behind all bins, so that what is counted here moves no slot.
OUTSIDE_BIN = THREADS - 1
# CTAs of a cluster: more than 8 is not portable. Source: PTX ISA and CUDA C++ Programming Guide, "Thread Block Clusters".
CLUSTER_SIZES = (1, 2, 4, 8)
# With more steps of 32 choices for each warp than this, choose_config takes the largest cluster.
SMALL_STEPS = 8
# Slots and padded rows are int32.
MAX_CHOICES = 2**30


@dataclass(frozen=True)
class Config:
    """One compiled kernel; it serves every number of tokens and of experts.

    Attributes:
        top_k: choices of a token.
        id_bits: of an id, 32 or 64.
        mapped: there is an expert_map.
        num_ctas: of the cluster.
        arch: one of archs.
        archs: those that the kernel is for.
    """

    archs: ClassVar[Collection[str]] = ARCHS

    top_k: int
    id_bits: int = 32
    mapped: bool = False
    num_ctas: int = 1
    arch: str = "sm_100a"

    def validate(self) -> Self:
        """Returns itself.

        Raises:
            ValueError: the kernel could not be compiled, or could not run on the architecture.
        """
        if self.arch not in self.archs:
            raise ValueError(f"Config: arch is {self.arch!r}, expected one of {sorted(self.archs)}")
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise ValueError(f"Config: top_k is {self.top_k}, expected 1 .. {MAX_TOP_K}")
        if self.id_bits not in (32, 64):
            raise ValueError(f"Config: id_bits is {self.id_bits}, expected 32 or 64")
        if self.num_ctas not in CLUSTER_SIZES:
            raise ValueError(f"Config: num_ctas is {self.num_ctas}, expected one of {CLUSTER_SIZES}")
        return self


def choose_config(num_tokens: int, top_k: int, id_bits: int, mapped: bool, arch: str = "sm_100a") -> Config:
    """One CTA for a small batch, the largest cluster for others.

    Args:
        num_tokens: T.
        top_k: choices of a token.
        id_bits: 32 or 64.
        mapped: there is an expert_map.
        arch: a key of ARCHS.

    Returns:
        One of two configurations for a model: no T ever needs a third kernel.

    Raises:
        ValueError: a value is outside its range.

    The choice follows from counting steps; it has not been measured on a B200.
    """
    return Config(top_k, id_bits, mapped, cluster_size(num_tokens * top_k), arch).validate()


def cluster_size(num_choices: int) -> int:
    """CTAs that choose_config takes."""
    return 1 if num_choices <= SMALL_STEPS * THREADS else max(CLUSTER_SIZES)


class Route(NamedTuple):
    """What route writes, all int32 and completely. E experts on this rank, P = max_padded_rows(T * top_k, E).

    Attributes:
        slot_token: (T * top_k,) - token of each slot.
        slot_row: (T * top_k,) - padded row of each slot; -1 for slots without an expert here.
        choice_row: (T * top_k,) - padded row of choice (t, j) at t * top_k + j; -1 without an expert here.
        count: (E,) - slots of each expert.
        padded_offset: (E + 1,) - first padded row of each expert, a multiple of 128, and the end of the last.
        tile_expert: (P / 128,) - expert of each 128 padded rows; -1 behind the last used tile.
        num_slots: (1,) - slots with an expert here; they are slots 0 .. num_slots - 1.
    """

    slot_token: torch.Tensor
    slot_row: torch.Tensor
    choice_row: torch.Tensor
    count: torch.Tensor
    padded_offset: torch.Tensor
    tile_expert: torch.Tensor
    num_slots: torch.Tensor


def route_sizes(num_tokens: int, top_k: int, num_experts: int) -> Route:
    """The number of elements of each of Route's tensors, in Route's order and under its names.

    Args:
        num_tokens: T, 0 or more.
        top_k: choices of a token.
        num_experts: E on this rank.

    Returns:
        A Route of integers: leading parts of larger workspaces serve as well as tensors of just these sizes.
    """
    n = num_tokens * top_k
    num_tiles = max_padded_rows(n, num_experts) // TILE_ROWS
    sizes: tuple[Any, ...] = (n, n, n, num_experts, num_experts + 1, num_tiles, 1)
    return Route(*sizes)


class _Smem(NamedTuple):
    """Shared memory of a CTA; a thread's own bin is its thread index."""

    # (THREADS, WARPS): choices of each warp in each bin; later the next slot of each warp in each bin.
    sCount: Any
    # (THREADS,): choices of this CTA in each bin; the other CTAs read it.
    sTotal: Any
    # (THREADS,): tiles of all lower bins.
    sTile: Any
    # (THREADS,): padded row less slot.
    sShift: Any
    # (WARPS,): sums of warps in the scans of slots and of tiles.
    sWarpSlots: Any
    sWarpTiles: Any


class _Place(NamedTuple):
    """Where a thread is: in its CTA, and its warp's range of choices."""

    thread: Any
    warp: Any
    lane: Any
    cta: Any
    first_choice: Any
    num_steps: Any


class RouteSm100:
    """The kernel of one Config.

    Args:
        config: validated here.
    """

    def __init__(self, config: Config) -> None:
        self.config = config.validate()

    @property
    def use_pdl(self) -> bool:
        """Launches overlap: see `hopper`, of which alone this is made use of."""
        return False

    @cute.jit
    def __call__(
        self,
        mIds: cute.Tensor,
        mMap: cute.Tensor | None,
        mSlotToken: cute.Tensor,
        mSlotRow: cute.Tensor,
        mChoiceRow: cute.Tensor,
        mCount: cute.Tensor,
        mPaddedOffset: cute.Tensor,
        mTileExpert: cute.Tensor,
        mNumSlots: cute.Tensor,
        stream: Any,
    ) -> None:
        """Launches one cluster.

        Args:
            mIds: (T, top_k) int32 or int64.
            mMap: (num_global_experts,) int32, or None.
            mSlotToken, mSlotRow, mChoiceRow, mCount, mPaddedOffset, mTileExpert, mNumSlots: the tensors of Route.
            stream: to launch on.
        """
        shape = (self.config.num_ctas, 1, 1)
        self.kernel(mIds, mMap, mSlotToken, mSlotRow, mChoiceRow, mCount, mPaddedOffset, mTileExpert, mNumSlots).launch(
            grid=shape, block=(THREADS, 1, 1), cluster=shape, stream=stream, use_pdl=self.use_pdl
        )

    @cute.kernel
    def kernel(
        self,
        mIds: cute.Tensor,
        mMap: cute.Tensor | None,
        mSlotToken: cute.Tensor,
        mSlotRow: cute.Tensor,
        mChoiceRow: cute.Tensor,
        mCount: cute.Tensor,
        mPaddedOffset: cute.Tensor,
        mTileExpert: cute.Tensor,
        mNumSlots: cute.Tensor,
    ) -> None:
        """Count, exchange, scan, hand out: every thread takes part in each."""
        if cutlass.const_expr(self.use_pdl):
            cute.arch.griddepcontrol_launch_dependents()
        num_choices, num_experts = cute.size(mSlotToken), cute.size(mCount)
        smem = self._allocate_smem()
        place = self._place(num_choices)
        bins = (mIds, mMap, num_choices, num_experts)

        for warp in cutlass.range_constexpr(WARPS):
            smem.sCount[place.thread, warp] = 0
        if cutlass.const_expr(self.use_pdl):
            cute.arch.griddepcontrol_wait()
        cute.arch.sync_threads()
        self._count(bins, smem, place)
        cute.arch.sync_threads()
        before, total = self._exchange(smem, place)
        slots_before, tiles_before = self._scan(total, num_experts, smem, place)
        self._hand_to_warps(slots_before + before, smem, place)
        cute.arch.sync_threads()
        self._hand_out(bins, mSlotToken, mSlotRow, mChoiceRow, smem, place)
        self._store_tile_experts(mTileExpert, num_experts, smem, place)
        if place.cta == 0:
            self._store_experts(mCount, mPaddedOffset, mNumSlots, total, slots_before, tiles_before, place)
        if cutlass.const_expr(self.config.num_ctas > 1):
            # Shared memory must outlive the CTAs that read it.
            cute.arch.cluster_wait()

    @cute.jit
    def _count(self, bins: Any, smem: _Smem, place: _Place) -> None:
        """Counts the choices of each warp's range by bin."""
        for step in cutlass.range(place.num_steps, unroll=1):
            own_bin = self._bin(bins, place.first_choice + step * WARP + place.lane)
            same = cute.arch.match_sync(cute.arch.FULL_MASK, own_bin)
            if same & cute.arch.lanemask_lt() == 0:
                smem.sCount[own_bin, place.warp] += cutlass.Int32(cute.arch.popc(same))
            # The next step's lanes see this step's counts.
            cute.arch.sync_warp()

    @cute.jit
    def _exchange(self, smem: _Smem, place: _Place) -> tuple[Any, Any]:
        """Returns choices in the thread's bin: those of lower CTAs, and of all."""
        total = cutlass.Int32(0)
        for warp in cutlass.range_constexpr(WARPS):
            total += smem.sCount[place.thread, warp]
        before = cutlass.Int32(0)
        if cutlass.const_expr(self.config.num_ctas > 1):
            smem.sTotal[place.thread] = total
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
            own = smem.sTotal.iterator + place.thread
            total = cutlass.Int32(0)
            for cta in cutlass.range_constexpr(self.config.num_ctas):
                if place.cta == cta:
                    before = total
                total += _load_from_cluster(cute.arch.map_dsmem_ptr(own, cta))
            # Waited for at the end of the kernel.
            cute.arch.cluster_arrive()
        return before, total

    @cute.jit
    def _scan(self, total: Any, num_experts: Any, smem: _Smem, place: _Place) -> tuple[Any, Any]:
        """Returns slots and tiles of all bins below the thread's; fills sTile and sShift."""
        tiles = cute.ceil_div(total, TILE_ROWS)
        if place.thread >= num_experts:
            # Choices without an expert have slots but no rows.
            tiles = cutlass.Int32(0)
        slots_in_warp = self._scan_warp(total, place)
        tiles_in_warp = self._scan_warp(tiles, place)
        if place.lane == WARP - 1:
            smem.sWarpSlots[place.warp] = slots_in_warp
            smem.sWarpTiles[place.warp] = tiles_in_warp
        cute.arch.sync_threads()
        slots_before, tiles_before = slots_in_warp - total, tiles_in_warp - tiles
        for warp in cutlass.range_constexpr(WARPS - 1):
            if warp < place.warp:
                slots_before += smem.sWarpSlots[warp]
                tiles_before += smem.sWarpTiles[warp]
        smem.sTile[place.thread] = tiles_before
        smem.sShift[place.thread] = tiles_before * TILE_ROWS - slots_before
        return slots_before, tiles_before

    @cute.jit
    def _scan_warp(self, value: Any, place: _Place) -> Any:
        """Returns the sum of value over this lane and those below it."""
        for distance in (1, 2, 4, 8, 16):
            lower = cute.arch.shuffle_sync_up(value, distance)
            if place.lane >= distance:
                value += lower
        return value

    @cute.jit
    def _hand_to_warps(self, first_slot: Any, smem: _Smem, place: _Place) -> None:
        """Turns each warp's count in the thread's bin into the warp's first slot in it."""
        for warp in cutlass.range_constexpr(WARPS):
            count = smem.sCount[place.thread, warp]
            smem.sCount[place.thread, warp] = first_slot
            first_slot += count

    @cute.jit
    def _hand_out(self, bins: Any, mSlotToken: Any, mSlotRow: Any, mChoiceRow: Any, smem: _Smem, place: _Place) -> None:
        """Gives each choice of the warp's range its slot and its row, in order."""
        _, _, num_choices, num_experts = bins
        for step in cutlass.range(place.num_steps, unroll=1):
            choice = place.first_choice + step * WARP + place.lane
            own_bin = self._bin(bins, choice)
            same = cute.arch.match_sync(cute.arch.FULL_MASK, own_bin)
            lower = same & cute.arch.lanemask_lt()
            next_slot = smem.sCount[own_bin, place.warp]
            # All lanes have read before one writes, and it has written before the next step reads.
            cute.arch.sync_warp()
            if lower == 0:
                smem.sCount[own_bin, place.warp] = next_slot + cutlass.Int32(cute.arch.popc(same))
            cute.arch.sync_warp()
            if choice < num_choices:
                slot = next_slot + cutlass.Int32(cute.arch.popc(lower))
                row = cutlass.Int32(-1)
                if own_bin < num_experts:
                    row = slot + smem.sShift[own_bin]
                mSlotToken[slot] = choice // self.config.top_k
                mSlotRow[slot] = row
                mChoiceRow[choice] = row

    @cute.jit
    def _bin(self, bins: Any, choice: Any) -> Any:
        """Returns the bin of a choice: an expert, num_experts for none, OUTSIDE_BIN behind the last choice."""
        mIds, mMap, num_choices, num_experts = bins
        gIds = cute.make_tensor(mIds.iterator, cute.make_layout(num_choices))
        # All lanes load, and all stay together for match.any.
        expert = gIds[cutlass.min(choice, num_choices - 1)]
        if cutlass.const_expr(self.config.mapped):
            num_global = cute.size(mMap)
            known = (expert >= 0) & (expert < num_global)
            local = mMap[cutlass.select_(known, cutlass.Int32(expert), cutlass.Int32(0))]
            expert = cutlass.select_(known, local, cutlass.Int32(-1))
        here = (expert >= 0) & (expert < num_experts)
        own_bin = cutlass.select_(here, cutlass.Int32(expert), num_experts)
        return cutlass.select_(choice < num_choices, own_bin, cutlass.Int32(OUTSIDE_BIN))

    @cute.jit
    def _store_tile_experts(self, mTileExpert: Any, num_experts: Any, smem: _Smem, place: _Place) -> None:
        """Finds the expert of each tile: the last one with no more than that many tiles before it."""
        first = place.cta * THREADS + place.thread
        used = smem.sTile[num_experts]
        for tile in cutlass.range(first, cute.size(mTileExpert), self.config.num_ctas * THREADS, unroll=1):
            expert = cutlass.Int32(-1)
            if tile < used:
                expert = cutlass.Int32(0)
                # Bins that are no expert have all used tiles before them, so the search passes none of them.
                for bit in (256, 128, 64, 32, 16, 8, 4, 2, 1):
                    if smem.sTile[expert + bit] <= tile:
                        expert += bit
            mTileExpert[tile] = expert

    @cute.jit
    def _store_experts(
        self,
        mCount: Any,
        mPaddedOffset: Any,
        mNumSlots: Any,
        total: Any,
        slots_before: Any,
        tiles_before: Any,
        place: _Place,
    ) -> None:
        """Stores what belongs to the thread's bin."""
        num_experts = cute.size(mCount)
        if place.thread < num_experts:
            mCount[place.thread] = total
        if place.thread <= num_experts:
            mPaddedOffset[place.thread] = tiles_before * TILE_ROWS
        if place.thread == num_experts:
            mNumSlots[0] = slots_before

    def _place(self, num_choices: Any) -> _Place:
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        num_warps = self.config.num_ctas * WARPS
        num_steps = cute.ceil_div(cute.ceil_div(num_choices, WARP), num_warps)
        first_choice = (cta * WARPS + warp) * num_steps * WARP
        return _Place(thread, warp, cute.arch.lane_idx(), cta, first_choice, num_steps)

    def _allocate_smem(self) -> _Smem:
        smem = memory.SmemAllocator()

        def integers(*shape: int) -> Any:
            return smem.allocate_tensor(cutlass.Int32, cute.make_layout(shape), 16)

        return _Smem(
            sCount=integers(THREADS, WARPS),
            sTotal=integers(THREADS),
            sTile=integers(THREADS),
            sShift=integers(THREADS),
            sWarpSlots=integers(WARPS),
            sWarpTiles=integers(WARPS),
        )


def _load_from_cluster(pointer: cute.Pointer) -> cutlass.Int32:
    """Returns the int32 at an address in another CTA's shared memory; tensors there have no loads in CuTe DSL 4.8."""
    return cutlass.Int32(llvm.load(cutlass.Int32.mlir_type, pointer.to_llvm_ptr()))


def route(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, out: Route) -> None:
    """Sorts choices by expert, stably, and gives every slot its padded row.

    Args:
        topk_ids: (T, top_k) int32 or int64 - ids of experts, local ones or, with a map, global ones; T may be 0, then all
            counts and offsets are 0. -1, and any other id outside the experts (or the map), is a choice without an
            expert on this rank. An id that is too large is an error for `cutedsl.reference.moe`; here nobody can raise
            without asking the device, so it counts as no expert.
        expert_map: (num_global_experts,) int32 - local id of each global one, or -1; None: ids are local.
        out: written completely; its sizes are those of route_sizes, E is the size of `count`, at most 512.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: a shape, stride or device is not as above, top_k not in 1 .. 16, E not in 1 .. 512, the map empty, or
            there are more than 2**30 choices.

    Layout: all contiguous. Numerics: integers; equal to `cutedsl.routing.sort_by_expert` and
    `cutedsl.layout.swizzle_grouped_block_scale`; deterministic. Out must not overlap the inputs.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream, nothing is
    allocated and nothing read back. Not verified on hardware.
    """
    check(topk_ids, expert_map, out)
    num_tokens, top_k = topk_ids.shape
    config = choose_config(num_tokens, top_k, topk_ids.element_size() * 8, expert_map is not None)
    compiled(config)(topk_ids, expert_map, *out)


def compiled(config: Config, line_info: bool | None = None) -> Callable[..., None]:
    """The compiled kernel: takes topk_ids, expert_map or None, and the tensors of a Route, unchecked.

    Args:
        config: which kernel.
        line_info: as cutedsl.compile takes it.
    """
    return compiler.compiled(RouteSm100, config, lambda: stand_ins(config), config.arch, line_info)


def check(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, out: Route) -> None:
    """Raises what route raises; reads no device memory."""
    _check("topk_ids", topk_ids, (torch.int32, torch.int64), (None, None), topk_ids)
    num_tokens, top_k = topk_ids.shape
    if not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"route: top_k is {top_k}, expected 1 .. {MAX_TOP_K}")
    if num_tokens * top_k > MAX_CHOICES:
        raise ValueError(
            f"route: {num_tokens} tokens have {num_tokens * top_k} choices, expected at most {MAX_CHOICES}: slots "
            "are int32; split the batch"
        )
    if expert_map is not None:
        _check("expert_map", expert_map, (torch.int32,), (None,), topk_ids)
        if not len(expert_map):
            raise ValueError("route: expert_map is empty, expected (num_global_experts,); pass None for no map")
    _check("count", out.count, (torch.int32,), (None,), topk_ids)
    num_experts = len(out.count)
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"route: count has {num_experts} experts, expected 1 .. {MAX_EXPERTS}")
    sizes = route_sizes(num_tokens, top_k, num_experts)
    for name, tensor, size in zip(Route._fields, out, sizes, strict=True):
        _check(name, tensor, (torch.int32,), (int(size),), topk_ids)


def _check(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...], ids: torch.Tensor
) -> None:
    registry.check_tensor("route", name, tensor, dtypes, shape, ids.device)
    if not tensor.is_contiguous():
        raise ValueError(f"route: {name} has strides {tensor.stride()}, expected contiguous; copy it")


def stand_ins(config: Config) -> tuple[Any, ...]:
    """Returns what the kernel is compiled with: route's arguments with symbolic sizes."""

    def vector(size: Any = None) -> Any:
        return make_fake_compact_tensor(cutlass.Int32, (cute.sym_int() if size is None else size,))

    id_dtype = cutlass.Int64 if config.id_bits == 64 else cutlass.Int32
    ids = make_fake_compact_tensor(id_dtype, (cute.sym_int(), config.top_k), stride_order=(1, 0))
    num_choices = cute.sym_int()
    choices = (vector(num_choices) for _ in range(3))
    experts = (vector(), vector(), vector(), vector(1))
    return (
        ids,
        vector() if config.mapped else None,
        *choices,
        *experts,
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
