"""What ptxas made of the grouped GEMM on Hopper: it may run one MMA after the other and says so to nobody.

It does where it finds no registers for MMAs in flight, or cannot tell that nobody touches theirs; results are the same.
"""

import re
import subprocess
from pathlib import Path

import pytest
from hopper_kit import on_hopper
from kernel_table import facts, find_cubin, nvdisasm

from cutedsl.kernels import grouped_gemm_sm90 as gemm
from cutedsl.kernels.grouped_gemm_sm90 import BF16, SWIGLU, SWIGLU_NVFP4, Config, Shape

__all__ = ["on_hopper"]

# Registers of an SM.
SM_REGISTERS = 1 << 16
CONFIGS = [
    gemm.choose_config(Shape(1, 6144, 7168, 384), SWIGLU),
    gemm.choose_config(Shape(16, 6144, 7168, 384), SWIGLU_NVFP4),
    gemm.choose_config(Shape(64, 7168, 3072, 384), SWIGLU_NVFP4),
    gemm.choose_config(Shape(80, 7168, 3072, 384), BF16),
    gemm.choose_config(Shape(128, 7168, 3072, 384), BF16),
    gemm.choose_config(Shape(150, 7168, 3072, 384), BF16),
    gemm.choose_config(Shape(150, 6144, 7168, 384), SWIGLU_NVFP4),
    gemm.choose_config(Shape(1, 7168, 16384), BF16),
    gemm.choose_config(Shape(64, 65536, 1536), BF16),
    gemm.choose_config(Shape(128, 2048, 7168), BF16),
    gemm.choose_config(Shape(8192, 7168, 16384), BF16),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_mmas_overlap(tmp_path: Path, config: Config) -> None:
    compiled = gemm.compiled(config, line_info=False)
    compiled.export_to_c(object_file_path=str(tmp_path / "kernel.o"), function_name="kernel")
    cubin = find_cubin((tmp_path / "kernel.o").read_bytes())
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    command = [nvdisasm(), "-c", str(tmp_path / "kernel.cubin")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    mmas = re.findall(r"\bHGMMA\b.*", text)
    # The last MMA of a group says so; where all do, each is waited for.
    groups = [mma for mma in mmas if "gsb0" in mma]
    assert len(mmas) == len(groups) * config.lot_steps * config.blocks_of_warpgroup, (
        f"{len(mmas)} MMAs in {len(groups)} groups"
    )
    found = facts(cubin, str(compiled.ir_module))
    # Otherwise ptxas has ignored the registers that warpgroups give each other.
    threads = config.consumer_threads + gemm.WARPGROUP
    assert found.registers == SM_REGISTERS // threads // 8 * 8
    assert found.local == found.stack == 0, "sums or weights are in memory"
    assert found.dynamic_smem <= config.smem_bytes
