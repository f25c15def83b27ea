"""Products that must be rounded before they are added: in the machine code, as the simulator sees only the PTX."""

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import cutlass
import pytest
from cutlass import cute
from kernel_table import find_cubin, nvdisasm

from cutedsl.kernels import finalize_sm100, inverse_rope_quantize_sm100
from cutedsl.kernels.rounding import rounded_product


def float_instructions(compiled: Any, folder: Path) -> Counter[str]:
    """FP32 opcodes of a compiled TVM-FFI function's machine code: that of the ptxas inside CuTe DSL, which is what ships."""
    compiled.export_to_c(object_file_path=str(folder / "kernel.o"), function_name="kernel")
    (folder / "kernel.cubin").write_bytes(find_cubin((folder / "kernel.o").read_bytes()))
    command = [nvdisasm(), "-c", str(folder / "kernel.cubin")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Counter(re.findall(r"\b(F(?:FMA|MUL|ADD)2?)\b", text))


@pytest.mark.parametrize("y_fp32", [False, True])
def test_finalize_rounds_each_product(tmp_path: Path, y_fp32: bool) -> None:
    config = finalize_sm100.choose_config(6, y_fp32, True)
    found = float_instructions(finalize_sm100.compiled(config, line_info=False), tmp_path)
    # 6 choices x 8 columns, and as many sums in pairs with the shared expert's.
    assert found == {"FMUL": 48, "FADD2": 28}


def test_inverse_rope_rounds_each_product(tmp_path: Path) -> None:
    compiled = inverse_rope_quantize_sm100.compiled(inverse_rope_quantize_sm100.Config(), line_info=False)
    found = float_instructions(compiled, tmp_path)
    # The block's 8 pairs. Scalar FFMAs are those of exact divisions.
    assert found["FADD2"] == 8
    assert found["FFMA2"] == 0


@cute.kernel
def _sums(mA: cute.Tensor, fused: cutlass.Constexpr):
    i, _, _ = cute.arch.thread_idx()
    a, b = mA[2 * i], mA[2 * i + 1]
    if cutlass.const_expr(fused):
        products = cute.arch.mul_packed_f32x2((a, b), (b, b), rnd="rn")
    else:
        products = rounded_product(a, b), rounded_product(b, b)
    mA[2 * i], mA[2 * i + 1] = cute.arch.add_packed_f32x2(products, (b, a), rnd="rn")


@cute.jit
def _launch_sums(mA: cute.Tensor, fused: cutlass.Constexpr):
    _sums(mA, fused).launch(grid=(1, 1, 1), block=(32, 1, 1))


@pytest.mark.parametrize("fused", [True, False])
def test_why_packed_products_are_not_used(tmp_path: Path, fused: bool) -> None:
    """The trap itself: should ptxas stop fusing packed products, this says so and rounding.py can go."""
    from cutlass.cute.runtime import make_fake_compact_tensor

    compiled = cute.compile(
        _launch_sums, make_fake_compact_tensor(cutlass.Float32, (64,)), fused, options="--enable-tvm-ffi"
    )
    found = float_instructions(compiled, tmp_path)
    assert (found["FFMA2"] > 0) == fused
