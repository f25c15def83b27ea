"""Facts of the formats, against the bit patterns of the types."""

import dataclasses
import subprocess
import sys

import numerics
import pytest
import torch

from cutedsl.formats import NVFP4


def test_code_values_are_those_of_the_e2m1_bits() -> None:
    assert NVFP4.code_values == tuple(numerics.E2M1)
    assert NVFP4.code_max == max(numerics.E2M1)


def test_scale_max_is_that_of_the_type() -> None:
    assert NVFP4.scale_dtype == torch.float8_e4m3fn
    assert NVFP4.scale_max == torch.finfo(NVFP4.scale_dtype).max == numerics.E4M3[-1]


def test_sizes_and_divisor() -> None:
    assert (NVFP4.block_size, NVFP4.codes_per_byte, NVFP4.tensor_scale_divisor) == (16, 2, 2688.0)


def test_format_is_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NVFP4.code_max = 4.0  # type: ignore[misc]
    assert len({NVFP4, dataclasses.replace(NVFP4)}) == 1


def test_package_imports_neither_torch_nor_vllm() -> None:
    command = "import sys, cutedsl; sys.exit(any(m.split('.')[0] in ('torch', 'vllm', 'cutlass') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-S", "-c", command], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


def test_operators_do_not_import_vllm() -> None:
    command = (
        "import sys, cutedsl.ops, cutedsl.runners.linear, cutedsl.runners.moe, cutedsl.runners.shared_expert, "
        "cutedsl.runners.wo_a; sys.exit(any(m.split('.')[0] == 'vllm' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", command], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
