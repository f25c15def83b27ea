"""Number formats as frozen data, so that no kernel, test or loader writes down 6, 16 or 448 a second time.

The hard part is that a block-scaled format has three scales of different types (code, block, tensor) whose maxima
multiply; `tensor_scale_divisor` is the one place where that product is formed.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockFormat:
    """A block-scaled format: value = sign * code_values[index] * block_scale * tensor_scale.

    Attributes:
        name: the name used in messages.
        code_values: the magnitudes by index; the sign is the bit above the index.
        code_max: the largest magnitude.
        block_size: elements along K that share a block scale.
        scale_dtype: type of a block scale.
        scale_max: largest finite block scale.
        codes_per_byte: codes in a byte; element 0 of a byte sits in its low bits.
    """

    name: str
    code_values: tuple[float, ...]
    code_max: float
    block_size: int
    scale_dtype: torch.dtype
    scale_max: float
    codes_per_byte: int

    @property
    def tensor_scale_divisor(self) -> float:
        """The divisor of tensor_scale = amax / divisor, with which the largest element meets both maxima."""
        return self.code_max * self.scale_max


NVFP4 = BlockFormat(
    name="nvfp4",
    code_values=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    code_max=6.0,
    block_size=16,
    scale_dtype=torch.float8_e4m3fn,
    scale_max=448.0,
    codes_per_byte=2,
)
