"""Runner of an NVFP4 linear, plain or fused from shards that keep their own tensor scales.

The hard part is fusing: q_a and kv (or gate and up) become one matrix, but merging their scales by max() would silently
rescale one of them. Each shard keeps both scales; whether the activation can be quantized once is decided here, once.
"""

from collections.abc import Callable, Sequence

import torch

from cutedsl.ops import registry
from cutedsl.reference import linear as reference
from cutedsl.runners import check_packed, check_scale, pack_matrix, select_backend


class LinearRunner:
    """y = bf16(alpha * (Q(x) @ W^T)) for one layer.

    Args:
        name: of the layer, used in every message.
        weight: (N, K/2) uint8, contiguous - packed codes; K on this rank a multiple of 16.
        weight_scale: (N, K/16) e4m3, contiguous - block scales, not swizzled.
        weight_scale_2: (num_shards,) fp32 - tensor scale of each shard, finite and positive.
        input_scale: (num_shards,) fp32 - activation's tensor scale for each shard, finite and positive.
        shard_sizes: rows of each shard, positive, sum N.
        backend: a key of BACKENDS.

    Attributes:
        runner_id: what the op takes; the registry keeps the runner alive.
        in_features, out_features: K and N.
        device: of the weight.
        matrix: the weight with alpha (N,) and its rows by distinct input_scale.

    Raises:
        TypeError: a type is wrong.
        ValueError: a shape, device or value is wrong, or the backend is unknown.

    Numerics: as reference.linear. Construction reads scales back to the host; a call does not.
    """

    def __init__(
        self,
        name: str,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_scale_2: torch.Tensor,
        input_scale: torch.Tensor,
        shard_sizes: Sequence[int],
        backend: str = "reference",
    ) -> None:
        self.name = name
        self.backend = backend
        self._forward = select_backend(name, backend, BACKENDS)
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
        self.matrix = pack_matrix(weight, weight_scale, self.weight_scale_2, self.input_scale, self.shard_sizes)
        self.runner_id = registry.register(self, "linear")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the layer: x (M, K) bfloat16 -> (M, N) bfloat16. The op has checked x."""
        return self._forward(self, x)


def _reference(runner: LinearRunner, x: torch.Tensor) -> torch.Tensor:
    return reference.linear(x, runner.matrix)


BACKENDS: dict[str, Callable[[LinearRunner, torch.Tensor], torch.Tensor]] = {"reference": _reference}
