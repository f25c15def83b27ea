"""Runner of an NVFP4 linear, plain or fused from shards that keep their own tensor scales.

The hard part is fusing: q_a and kv (or gate and up) become one matrix, but merging their scales by max() would silently
rescale one of them. Each shard keeps both scales; whether the activation can be quantized once is decided here, once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from cutedsl.formats import NVFP4
from cutedsl.layout import padded_shape
from cutedsl.ops import registry
from cutedsl.quantize import unscaled_activation
from cutedsl.reference import linear as reference
from cutedsl.runners import (
    check_activations,
    check_packed,
    check_scale,
    import_chains,
    pack_matrix,
    select_backend,
)


class QuantizedRow(NamedTuple):
    """A row of the input as a backend multiplies it.

    Attributes:
        dtype: uint8 - packed codes; or bfloat16 - codes times block scales.
        columns: elements of dtype.
        sf_columns: block scales beside packed codes; 0: none.
    """

    dtype: torch.dtype
    columns: int
    sf_columns: int

    def sf_shape(self, num_rows: int) -> tuple[int, int]:
        """Of the swizzled block scales of so many rows."""
        return padded_shape(num_rows, self.sf_columns) if self.sf_columns else (0, 0)


class LinearRunner:
    """y = bf16(alpha * (Q(x) @ W^T)) for one layer; without Q if activations are "bf16".

    Args:
        name: of the layer, used in every message.
        weight: (N, K/2) uint8, contiguous - packed codes; K on this rank a multiple of 16.
        weight_scale: (N, K/16) e4m3, contiguous - block scales, not swizzled.
        weight_scale_2: (num_shards,) fp32 - tensor scale of each shard, finite and positive.
        input_scale: (num_shards,) fp32 - activation's tensor scale for each shard, finite and positive.
        shard_sizes: rows of each shard, positive, sum N.
        backend: a key of BACKENDS. sm100 and sm90 prepare the weight in place (`cutedsl.prepare`, `cutedsl.prepare_sm90`):
            nothing else can use it any more.
        activations: "nvfp4": quantized with input_scale; "bf16": as they are. sm100 has nvfp4 only.

    Attributes:
        runner_id: what the op takes; the registry keeps the runner alive.
        in_features, out_features: K and N.
        device: of the weight.
        matrix: the weight with alpha (N,) and its rows by distinct input_scale; backend reference only.
        activations: as given.
        quantized_row: what `quantize` makes of a row; None: activations are "bf16", or input scales differ.
        chain: of kernels, with its workspace; backends sm100 and sm90 only.

    Raises:
        TypeError: a type is wrong.
        ValueError: a shape, device or value is wrong, the backend is unknown, or cannot compute this layer.

    Numerics: as reference.linear; the order of sums is the backend's. Construction reads scales back to the
    host; a call does not.
    """

    chain: Any

    def __init__(
        self,
        name: str,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_scale_2: torch.Tensor,
        input_scale: torch.Tensor,
        shard_sizes: Sequence[int],
        backend: str = "reference",
        activations: str = NVFP4.name,
    ) -> None:
        self.name = name
        self.backend = backend
        make_forward = select_backend(name, backend, BACKENDS)
        self.activations = check_activations(name, activations, backend)
        self.shard_sizes = tuple(int(size) for size in shard_sizes)
        if not self.shard_sizes or min(self.shard_sizes) < 1:
            raise ValueError(f"{name}: shard_sizes are {self.shard_sizes}, expected one positive row count per shard")
        self.out_features = sum(self.shard_sizes)
        self.in_features = check_packed(name, "linear", weight, weight_scale, (self.out_features,))
        self.device = weight.device
        shape = (len(self.shard_sizes),)
        self.weight, self.weight_scale = weight, weight_scale
        self.weight_scale_2 = check_scale(name, "weight_scale_2", weight_scale_2, shape, self.device)
        self.input_scale = check_scale(name, "input_scale", input_scale, shape, self.device)
        scales = self.weight_scale_2, self.input_scale
        self.matrix = pack_matrix(weight, weight_scale, *scales, self.shard_sizes, activations)
        self.quantized_row = self._quantized_row() if len(self.matrix.scale_groups) == 1 else None
        self._forward = make_forward(self)
        self.runner_id = registry.register(self, "linear")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the layer: x (M, K) bfloat16 -> (M, N) bfloat16. The op has checked x."""
        return self._forward(self, x)

    def quantize(self, x: torch.Tensor, sf: torch.Tensor) -> torch.Tensor:
        """The first half of a call, for `quantized_row`s: x (M, K) bfloat16 -> rows; their block scales go to sf."""
        if self.backend == "reference":
            return unscaled_activation(x, self.matrix.scale_groups[0].input_scale)
        return self.chain.quantize(x, sf)

    def multiply(self, a: torch.Tensor, sf: torch.Tensor) -> torch.Tensor:
        """The second half: `quantized_row`s -> (M, N) bfloat16."""
        if self.backend == "reference":
            return reference.linear_of_unscaled(a, self.matrix)
        return self.chain.multiply(a, sf)

    def _quantized_row(self) -> QuantizedRow:
        if self.backend == "sm100":
            k = self.in_features
            return QuantizedRow(torch.uint8, k // NVFP4.codes_per_byte, k // NVFP4.block_size)
        return QuantizedRow(torch.bfloat16, self.in_features, 0)


Forward = Callable[[LinearRunner, torch.Tensor], torch.Tensor]


def _reference(runner: LinearRunner) -> Forward:
    return lambda runner, x: reference.linear(x, runner.matrix)


def _chain(runner: LinearRunner) -> Forward:
    runner.chain = import_chains(runner.name, runner.backend).LinearChain(runner.name, runner.matrix)
    # What was prepared in place is no matrix for others, and what was replaced should not be kept.
    del runner.matrix, runner.weight, runner.weight_scale
    return lambda runner, x: runner.chain(x)


BACKENDS: dict[str, Callable[[LinearRunner], Forward]] = {"reference": _reference, "sm100": _chain, "sm90": _chain}
