import dataclasses

import numpy as np
import pytest
from asm_kit import aligned, clean, codes, run, wait

from ptxsim import tensormap
from ptxsim.findings import Unsupported
from ptxsim.tensormap import Interleave, OobFill, Swizzle, TensorMap
from ptxsim.tensormap_ops import set_field

POLICIES = ("eager", "random", "lazy")
ADDRESS = 0x7F0000001000
PLAIN = TensorMap(ADDRESS, "u8", (64, 32, 4, 3, 2), (64, 2048, 8192, 24576), (32, 8, 1, 1, 1), (1, 1, 1, 1, 1))

FIELDS = [
    ("global_address", 0, ADDRESS + 4096, {"global_address": ADDRESS + 4096}),
    ("global_dim", 0, 48, {"dims": (48, 32, 4, 3, 2)}),
    ("global_dim", 4, 1 << 20, {"dims": (64, 32, 4, 3, 1 << 20)}),
    ("global_stride", 0, 80, {"strides_bytes": (80, 2048, 8192, 24576)}),
    ("global_stride", 3, (1 << 40) - 16, {"strides_bytes": (64, 2048, 8192, (1 << 40) - 16)}),
    ("box_dim", 1, 16, {"box": (32, 16, 1, 1, 1)}),
    ("box_dim", 0, 256, {"box": (256, 8, 1, 1, 1)}),
    ("element_stride", 2, 5, {"element_strides": (1, 1, 5, 1, 1)}),
    ("elemtype", 0, 1, {"dtype": "u16"}),
    ("elemtype", 0, 9, {"dtype": "f64"}),
    ("elemtype", 0, 10, {"dtype": "bf16"}),
    ("elemtype", 0, 11, {"dtype": "tf32"}),
    ("elemtype", 0, 13, {"dtype": "b4x16"}),
    ("swizzle_mode", 0, 3, {"swizzle": Swizzle.B128}),
    ("interleave_layout", 0, 1, {"interleave": Interleave.B16}),
    ("fill_mode", 0, 1, {"oob_fill": OobFill.NAN}),
]


@pytest.mark.parametrize(("field", "ordinal", "value", "change"), FIELDS)
def test_fields(field, ordinal, value, change):
    """Each field goes where the driver's encoding has it."""
    data = bytearray(tensormap.encode(PLAIN))
    set_field(data, field, ordinal, value)
    assert tensormap.decode(bytes(data)) == dataclasses.replace(PLAIN, **change)


def test_rank_is_one_less():
    data = bytearray(tensormap.encode(TensorMap(ADDRESS, "u8", (64, 32), (64,), (32, 8), (1, 1))))
    set_field(data, "rank", 0, 2)
    set_field(data, "global_stride", 1, 2048)
    assert tensormap.decode(bytes(data)).rank == 3


def test_values_that_do_not_fit():
    for field, value in (
        ("global_address", 8),
        ("global_stride", 24),
        ("box_dim", 257),
        ("element_stride", 9),
        ("rank", 5),
    ):
        with pytest.raises(ValueError, match="must be"):
            set_field(bytearray(128), field, 0, value)


# A kernel that changes a map and copies with it. %g0: map in global memory, %g1: tensor, %g2: result.

BUILD = """
setp.ge.u32 %p1, %tid, 32;
@%first mbarrier.init.shared.b64 [%sm], 1;
@%first fence.mbarrier_init.release.cluster;
mov.b32 %r1, 0;
add.u32 %r4, %sm, 1024;
shl.b32 %r2, %lane, 2;
add.u32 %r3, %r4, %r2;
cvt.u64.u32 %d0, %r2;
add.u64 %d1, %g0, %d0;
ld.global.b32 %r5, [%d1];
st.shared.b32 [%r3], %r5;
bar.warp.sync -1;
@%first tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r4], %g1;
@%first tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r4], 1, 4;
@%first tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [%r4], 0;
bar.warp.sync -1;
"""
COPY = f"""
add.u32 %r6, %sm, 2048;
@%first mbarrier.arrive.expect_tx.shared.b64 _, [%sm], 512;
@%first cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r6], [%g0, {{%r1, %r1}}], [%sm];
{wait("%sm", 0)}
shl.b32 %r7, %lane, 4;
add.u32 %r8, %r6, %r7;
ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r8];
cvt.u64.u32 %d2, %r7;
add.u64 %d3, %g2, %d2;
st.global.v4.b32 [%d3], {{%r10, %r11, %r12, %r13}};
"""
PUBLISH = "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%g0], [%r4], 128;"
ACQUIRE = "fence.proxy.tensormap::generic.acquire.gpu [%g0], 128;"


def data():
    old = TensorMap(16, "u8", (64, 8), (64,), (64, 8), (1, 1), Swizzle.B64)
    table = aligned(np.frombuffer(tensormap.encode(old), np.uint8))
    tensor = aligned(np.arange(512, dtype=np.uint32).astype(np.uint8))
    return [table, tensor, aligned(np.zeros(512, np.uint8))]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_map_changed_in_shared_memory(policy):
    buffers = data()
    clean(BUILD + PUBLISH + ACQUIRE + COPY, buffers, policy=policy)
    want = buffers[1].copy()
    want[256:] = 0
    assert (buffers[2] == want).all()


def test_missing_acquire():
    assert codes(BUILD + PUBLISH + COPY, data()) == {"missing-proxy-fence"}


def test_missing_release():
    stores = """
    ld.shared.b32 %r5, [%r3];
    st.global.b32 [%d1], %r5;
    bar.warp.sync -1;
    """
    assert codes(BUILD + stores + ACQUIRE + COPY, data()) == {"missing-proxy-fence"}
    release = "fence.proxy.tensormap::generic.release.gpu;"
    clean(BUILD + stores + release + ACQUIRE + COPY, data())


def test_changed_in_place_in_global_memory():
    text = (
        BUILD.split("@%first tensormap")[0]
        + """
    @%first tensormap.replace.tile.global_address.global.b1024.b64 [%g0], %g1;
    @%first tensormap.replace.tile.global_dim.global.b1024.b32 [%g0], 1, 4;
    @%first tensormap.replace.tile.swizzle_mode.global.b1024.b32 [%g0], 0;
    fence.proxy.tensormap::generic.release.gpu;
    """
    )
    buffers = data()
    clean(text + ACQUIRE + COPY, buffers)
    assert (buffers[2][:256] == buffers[1][:256]).all()


def test_acquire_before_the_change_does_not_count():
    assert codes(ACQUIRE + BUILD + PUBLISH + COPY, data()) == {"missing-proxy-fence"}


def test_unchanged_maps_in_global_memory_need_no_fence():
    buffers = data()
    good = dataclasses.replace(tensormap.decode(buffers[0].tobytes()), global_address=buffers[1].ctypes.data)
    buffers[0][:] = np.frombuffer(tensormap.encode(good), np.uint8)
    clean(BUILD.split("add.u32 %r4")[0] + COPY, buffers)


def test_misaligned_maps():
    assert codes(BUILD + PUBLISH.replace("[%r4]", "[%r4+64]"), data()) == {"misaligned"}
    assert codes("@%first tensormap.replace.tile.rank.global.b1024.b32 [%g0+32], 1;", data()) == {"misaligned"}
    assert codes("@%first tensormap.replace.tile.box_dim.global.b1024.b32 [%g0], 1, 300;", data()) == {"bad-value"}


def test_unknown_forms_are_refused():
    for line in (
        "tensormap.replace.im2col.rank.global.b1024.b32 [%g0], 1;",
        "tensormap.replace.tile.rank.global.b1024.b64 [%g0], 1;",
        "tensormap.replace.tile.global_stride.global.b1024.b64 [%g0], 4, 16;",
        "tensormap.replace.tile.elemtype.global.b1024.b32 [%g0], 16;",
        "tensormap.replace.tile.elemtype.global.b1024.b32 [%g0], %r1;",
        "fence.proxy.tensormap::generic.acquire.gpu [%g0], 64;",
        "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.acquire.gpu.sync.aligned [%g0], [%sm], 128;",
    ):
        with pytest.raises(Unsupported):
            run(line, data())
