"""FP32 products that stay rounded.

The hard part is that two compilers fuse a product with the sum behind it. CuTe DSL's contracts a * b + c itself, and ptxas
fuses even `mul.rn.f32x2` with `add.rn.f32x2`, although .rn forbids it for scalars (seen in the machine code of CUDA 12.9,
tests/sim/test_rounding.py). Only the scalar `mul.rn.f32` is left alone by both.
"""

from typing import Any

import cutlass
from cutlass import cute


def rounded_product(a: Any, b: Any) -> cutlass.Float32:
    """a * b in FP32, rounded to nearest even, which no later sum can be fused with.

    Args:
        a, b: FP32 values in registers.

    Returns:
        FP32.
    """
    return cute.arch.inline_ptx(
        "mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[cutlass.Float32], read_only_args=[a, b]
    )
