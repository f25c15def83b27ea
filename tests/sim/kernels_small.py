"""Small CuTe DSL kernels for the tests of the host side: an elementwise copy, a tiled TMA copy, and host functions."""

from ptxsim.host.capture import capture, prepare_environment
from ptxsim.tensormap import MAP_BYTES

prepare_environment()

import cuda.bindings.driver as cuda  # noqa: E402
import cutlass  # noqa: E402
import cutlass.cute as cute  # noqa: E402
from cutlass.cute.nvgpu import cpasync  # noqa: E402
from cutlass.cute.runtime import make_ptr  # noqa: E402

THREADS = 64


@cute.kernel
def copy_kernel(source: cute.Tensor, target: cute.Tensor, scale: cutlass.Float32):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    i = block * THREADS + thread
    # copy_twice launches it so that it may begin before the launch before it has ended.
    cute.arch.griddepcontrol_wait()
    if i < cute.size(target):
        target[i] = (source[i] * scale).to(target.element_type)


@cute.jit
def copy_once(source: cute.Tensor, target: cute.Tensor, scale: cutlass.Float32, stream: cuda.CUstream):
    blocks = cute.ceil_div(cute.size(target), THREADS)
    copy_kernel(source, target, scale).launch(grid=(blocks, 1, 1), block=(THREADS, 1, 1), stream=stream)


@cute.jit
def copy_twice(source: cute.Tensor, target: cute.Tensor, scale: cutlass.Float32, stream: cuda.CUstream):
    blocks = cute.ceil_div(cute.size(target), THREADS)
    copy_kernel(source, target, scale).launch(grid=(blocks, 1, 1), block=(THREADS, 1, 1), stream=stream)
    copy_kernel(target, source, scale + 1).launch(
        grid=(blocks, 1, 1), block=(THREADS, 1, 1), smem=1024, use_pdl=True, stream=stream
    )


@cute.jit
def copy_pointers(
    source: cute.Pointer, target: cute.Pointer, count: cutlass.Int32, scale: cutlass.Float32, stream: cuda.CUstream
):
    layout = cute.make_layout(count)
    blocks = cute.ceil_div(count, THREADS)
    copy_kernel(cute.make_tensor(source, layout), cute.make_tensor(target, layout), scale).launch(
        grid=(blocks, 1, 1), block=(THREADS, 1, 1), stream=stream
    )


@cute.kernel
def tma_kernel(
    atom: cute.CopyAtom, source: cute.Tensor, target: cute.Tensor, layout: cute.ComposedLayout, tile: cutlass.Constexpr
):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    smem = cutlass.memory.SmemAllocator()
    buffer = smem.allocate_tensor(target.element_type, layout.outer, byte_alignment=1024, swizzle=layout.inner)
    barrier = smem.allocate_array(cutlass.Int64, 1)
    tiles = cute.local_tile(source, tile, (block, 0))
    shared, chunks = cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(buffer, 0, 2), cute.group_modes(tiles, 0, 2)
    )
    if thread == 0:
        cute.arch.mbarrier_init(barrier, 1)
    cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    if thread == 0:
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, cute.size_in_bytes(target.element_type, layout.outer))
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    if warp == 0:
        cute.copy(atom, chunks, shared, tma_bar_ptr=barrier)
    cute.arch.mbarrier_wait(barrier, 0)
    rows = cute.local_tile(target, tile, (block, 0))
    for i in cutlass.range(thread, cute.size(tile), THREADS):
        rows[i] = buffer[i]


@cute.jit
def tma_copy(
    source: cute.Tensor,
    target: cute.Tensor,
    swizzle_bits: cutlass.Constexpr,
    tile: cutlass.Constexpr,
    cluster: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    outer = cute.make_ordered_layout(tile, order=(1, 0))
    layout = cute.make_composed_layout(cute.make_swizzle(*swizzle_bits), 0, outer)
    atom, tensor = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), source, layout, tile)
    blocks = cute.ceil_div(cute.size(source, mode=[0]), tile[0])
    tma_kernel(atom, tensor, target, layout, tile).launch(
        grid=(blocks, 1, 1), block=(THREADS, 1, 1), cluster=cluster, stream=stream
    )


@cute.kernel
def prefetch_kernel(atom: cute.CopyAtom, tensor: cute.Tensor):
    cpasync.prefetch_descriptor(atom)


@cute.jit
def prefetch(
    pointer: cute.Pointer,
    shape: cutlass.Constexpr,
    strides: cutlass.Constexpr,
    tile: cutlass.Constexpr,
    swizzle_bits: cutlass.Constexpr,
    internal: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    source = cute.make_tensor(pointer, cute.make_layout(shape, stride=strides))
    outer = cute.make_ordered_layout(tile, order=tuple(range(len(tile))))
    layout = cute.make_composed_layout(cute.make_swizzle(*swizzle_bits), 0, outer)
    operation = cpasync.CopyBulkTensorTileG2SOp()
    atom, tensor = cpasync.make_tiled_tma_atom(operation, source, layout, tile, internal_type=internal)
    prefetch_kernel(atom, tensor).launch(grid=(1, 1, 1), block=(32, 1, 1), stream=stream)


def pack_tensor_map(
    dtype: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    tile: tuple[int, ...],
    swizzle_bits: tuple[int, int, int] = (0, 4, 3),
    internal: str | None = None,
) -> tuple[bytes, int]:
    """The tensor map that CuTe DSL packs for a tensor at a made-up address, and that address."""
    address = 0x7F12_3456_7000
    pointer = make_ptr(getattr(cutlass, dtype), address, cute.AddressSpace.gmem, assumed_align=128)
    kind = getattr(cutlass, internal) if internal else None
    stream = cuda.CUstream(0)
    compiled = cute.compile(prefetch, pointer, shape, strides, tile, swizzle_bits, kind, stream)
    [launch] = capture(compiled, pointer, stream)
    [packed] = [param for param in launch.params if len(param) == MAP_BYTES]
    return packed, address
