"""The sm100 backends: each operator as a chain of kernels on one stream, with nothing of PyTorch between them.

    linear         quantize -> GEMM, for each distinct input_scale
    shared expert  quantize -> grouped GEMM (one group; SwiGLU, quantize) -> GEMM
    MoE            route -> quantize (gather) -> grouped GEMM (SwiGLU, quantize) -> grouped GEMM -> finalize
    wo_a           inverse RoPE, quantize -> grouped GEMM

The hard part is memory that CUDA graphs can rely on: see `cutedsl.runners.workspace`.

With few rows (`SWAP_TOKENS`) a GEMM puts weights on the tensor core's M and tokens on its N (`grouped_gemm_swap_sm100`).
Which kernel runs depends on shapes alone, never on ids.

A chain takes over the weights: they are prepared in place (`cutedsl.prepare`) and mean nothing to other backends from then
on. What its kernels cannot do is refused before anything is changed.

Not verified on hardware.
"""

from typing import Any

import torch

from cutedsl import prepare
from cutedsl.formats import NVFP4
from cutedsl.kernels import (
    finalize_sm100,
    grouped_gemm_sm100,
    grouped_gemm_swap_sm100,
    inverse_rope_quantize_sm100,
    linear_sm100,
    quantize_sm100,
    route_sm100,
)
from cutedsl.kernels.grouped_gemm_sm100 import BF16, SWIGLU_NVFP4
from cutedsl.layout import TILE_ROWS, padded_shape
from cutedsl.prepare import Operand
from cutedsl.reference.linear import PackedMatrix
from cutedsl.runners import check_alignment, check_gpu, check_one_scale
from cutedsl.runners.workspace import Groups, Workspace, equal_groups, guess_tokens, workspace

# Up to this many tokens (of a group, as far as the host can tell) operands are swapped: a tile of the other GEMM has 128, and
# would be padding in part. docs/cost.md counts both ways.
SWAP_TOKENS = TILE_ROWS - 1
# In messages.
_BACKEND = "sm100"
# The kernels are compiled for sm_100a, which runs on nothing else.
CAPABILITY = (10, 0)


class LinearChain:
    """bf16(alpha * (Q(x) @ W^T)).

    Args:
        name: of the layer.
        matrix: checked; its scales are prepared in place.

    Attributes:
        workspace: of intermediate results.

    Raises:
        ValueError: K is no multiple of 32; the rows of a shard, no multiple of 8; another GPU than sm_100; a misaligned
            weight.

    Numerics: as reference.linear, sums in another order. Graph-safe: yes, after one call of at least this batch.
    """

    def __init__(self, name: str, matrix: PackedMatrix) -> None:
        check_linear(name, "the matrix", matrix)
        self.out_features, self.in_features = matrix.weight.shape[0], _k(matrix.weight)
        self.groups = prepare.prepare_linear(matrix)
        self.workspace = workspace("linear", matrix.weight.device)
        self._one_group = equal_groups(1, matrix.weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, K) bf16 -> (M, N) bf16."""
        m = x.shape[0]
        out = x.new_empty(m, self.out_features)
        if m == 0:
            return out
        codes, scales = _activation(self.workspace, "x", m, self.in_features)
        for group in self.groups:
            quantize_sm100.quantize(x, group.input_scale, codes, scales)
            for start, operand in group.spans:
                columns = operand.weight.shape[1]
                if columns == self.out_features:
                    self._gemm(codes, scales, operand, out)
                    continue
                # The GEMMs write whole rows, so that columns of some shards only pass through a matrix of their own.
                part = self.workspace.take("part", torch.bfloat16, m, columns)
                self._gemm(codes, scales, operand, part)
                out[:, start : start + columns].copy_(part)
        return out

    def quantize(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """x (M, K) bf16 -> codes (M, K/2) uint8, and their swizzled scales, for the one group there is."""
        (group,) = self.groups
        codes = x.new_empty(x.shape[0], self.in_features // NVFP4.codes_per_byte, dtype=torch.uint8)
        quantize_sm100.quantize(x, group.input_scale, codes, scales)
        return codes

    def multiply(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What `quantize` gives -> (M, N) bf16."""
        ((_, ((_, operand),)),) = self.groups
        out = codes.new_empty(codes.shape[0], self.out_features, dtype=torch.bfloat16)
        if codes.shape[0]:
            self._gemm(codes, scales, operand, out)
        return out

    def _gemm(self, codes: torch.Tensor, scales: torch.Tensor, operand: Operand, out: torch.Tensor) -> None:
        linear_gemm(codes, scales, operand, self._one_group.of(codes.shape[0]), out)


class SharedExpertChain:
    """bf16(down(swiglu(gate_up(x)))).

    Args:
        name: of the layer.
        gate_up: checked; prepared in place, rows too.
        down: checked; its scales are prepared in place.
        gate_up_weight_scale_2: (2,) fp32.
        gate_up_input_scale: (2,) fp32 - equal for gate and up.
        limit: of SwiGLU, or None.

    Attributes:
        workspace: of intermediate results.

    Raises:
        ValueError: gate and up have different input scales; the hidden size or I is no multiple of 32; another GPU than
            sm_100; a misaligned weight.

    Numerics: as reference.shared_expert, sums in another order, SiLU as `blackwell.swiglu`. Graph-safe: as LinearChain.
    """

    def __init__(
        self,
        name: str,
        gate_up: PackedMatrix,
        down: PackedMatrix,
        gate_up_weight_scale_2: torch.Tensor,
        gate_up_input_scale: torch.Tensor,
        limit: float | None,
    ) -> None:
        check_linear(name, "gate_up", gate_up)
        check_linear(name, "down", down)
        check_one_scale(name, gate_up_input_scale.unsqueeze(0), _BACKEND)
        self.hidden, self.intermediate, self.limit = _k(gate_up.weight), _k(down.weight), limit
        self.input_scale = gate_up_input_scale[:1]
        self.gate_up = prepare.prepare_experts(
            gate_up.weight.unsqueeze(0),
            gate_up.weight_scale.unsqueeze(0),
            gate_up_weight_scale_2.unsqueeze(0),
            gate_up_input_scale.unsqueeze(0),
        )
        ((self.h_scale, ((_, self.down),)),) = prepare.prepare_linear(down)
        self.workspace = workspace("shared_expert", down.weight.device)
        self._one_group = equal_groups(1, down.weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, H) bf16 -> (M, H) bf16."""
        m = x.shape[0]
        out = x.new_empty(m, self.hidden)
        if m == 0:
            return out
        rows = padded_shape(m, 0)[0]
        codes, scales = _activation(self.workspace, "x", rows, self.hidden)
        h_codes, h_scales = _activation(self.workspace, "h", rows, self.intermediate)
        groups = self._one_group.of(m)
        quantize_sm100.quantize(x, self.input_scale, codes[:m], scales)
        swiglu_gemm(codes, scales, self.gate_up, groups, self.limit, h_codes, h_scales, self.h_scale)
        linear_gemm(h_codes[:m], h_scales, self.down, groups, out)
        return out


class MoeChain:
    """bf16(sum over j of topk_weights[t, j] * expert[topk_ids[t, j]](x[t])).

    Args:
        name: of the layer.
        w13_weight, w13_weight_scale: (E, 2I, H/2) uint8, (E, 2I, H/16) e4m3 - checked; prepared in place, rows too.
        w13_weight_scale_2, w13_input_scale: (E, 2) fp32 - the latter equal for gate and up of an expert.
        w2_weight, w2_weight_scale: (E, H, I/2) uint8, (E, H, I/16) e4m3 - checked; scales prepared in place.
        w2_weight_scale_2, w2_input_scale: (E,) fp32.
        expert_map: (num_global_experts,) int32 or int64, or None.
        limit: of SwiGLU, or None.

    Attributes:
        workspace: of intermediate results.

    Raises:
        ValueError: an expert's gate and up have different input scales; the hidden size or I is no multiple of 32; there
            are more than 512 experts; another GPU than sm_100; a misaligned weight.

    Numerics: as reference.moe, but each expert's output is rounded to BF16 before it is weighted, sums have another order,
    SiLU is `blackwell.swiglu`; an id outside the experts (or the map) counts as -1. Graph-safe: as LinearChain.
    """

    def __init__(
        self,
        name: str,
        w13_weight: torch.Tensor,
        w13_weight_scale: torch.Tensor,
        w13_weight_scale_2: torch.Tensor,
        w13_input_scale: torch.Tensor,
        w2_weight: torch.Tensor,
        w2_weight_scale: torch.Tensor,
        w2_weight_scale_2: torch.Tensor,
        w2_input_scale: torch.Tensor,
        expert_map: torch.Tensor | None,
        limit: float | None,
    ) -> None:
        self.num_experts = w13_weight.shape[0]
        if self.num_experts > route_sm100.MAX_EXPERTS:
            raise ValueError(
                f"{name}: there are {self.num_experts} experts on this rank, the sm100 backend takes at most "
                f"{route_sm100.MAX_EXPERTS}; use more ranks"
            )
        check_gpu(name, w13_weight.device, CAPABILITY, _BACKEND)
        for label, weight, scale in (("w13", w13_weight, w13_weight_scale), ("w2", w2_weight, w2_weight_scale)):
            _check_sizes(name, label, weight.shape[-2], _k(weight))
            check_alignment(name, label, weight, scale, backend=_BACKEND)
        check_one_scale(name, w13_input_scale, _BACKEND)
        self.hidden, self.intermediate, self.limit = _k(w13_weight), _k(w2_weight), limit
        self.num_global_experts = self.num_experts if expert_map is None else len(expert_map)
        self.expert_map = None if expert_map is None else expert_map.to(torch.int32).contiguous()
        self.input_scale, self.h_scale = w13_input_scale[:, 0].contiguous(), w2_input_scale
        self.w13 = prepare.prepare_experts(w13_weight, w13_weight_scale, w13_weight_scale_2, w13_input_scale)
        self.w2 = prepare.prepare_experts(w2_weight, w2_weight_scale, w2_weight_scale_2, w2_input_scale)
        self.workspace = workspace("moe", w13_weight.device)

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """x (T, H) bf16, topk_weights (T, top_k) fp32, topk_ids (T, top_k) int32 or int64 -> (T, H) bf16."""
        out = x.new_empty(x.shape[0], self.hidden)
        if x.shape[0] == 0:
            return out
        compact = self.workspace.compact
        topk_weights, topk_ids = compact("weights", topk_weights), compact("ids", topk_ids)
        route = self._route(topk_ids)
        rows = len(route.tile_expert) * TILE_ROWS
        codes, scales = _activation(self.workspace, "x", rows, self.hidden)
        h_codes, h_scales = _activation(self.workspace, "h", rows, self.intermediate)
        y = self.workspace.take("y", torch.bfloat16, rows, self.hidden)
        quantize_sm100.quantize_slots(
            x, self.input_scale, route.slot_token, route.slot_row, route.num_slots, route.tile_expert, codes, scales
        )
        tokens = guess_tokens(len(topk_ids), topk_ids.shape[1], self.num_global_experts)
        groups = Groups(route.tile_expert, route.padded_offset, route.count, tokens)
        swiglu_gemm(codes, scales, self.w13, groups, self.limit, h_codes, h_scales, self.h_scale)
        grouped_gemm(h_codes, h_scales, self.w2, groups, y)
        finalize_sm100.finalize(y, route.choice_row, topk_weights, None, out)
        return out

    def _route(self, topk_ids: torch.Tensor) -> route_sm100.Route:
        num_tokens, top_k = topk_ids.shape
        sizes = route_sm100.route_sizes(num_tokens, top_k, self.num_experts)._asdict()
        take = self.workspace.take
        route = route_sm100.Route(**{name: take(name, torch.int32, int(size)) for name, size in sizes.items()})
        route_sm100.route(topk_ids, self.expert_map, route)
        return route


class WoAChain:
    """bf16(alpha * (Q(inverse_rope(o)[t, g]) @ W[g]^T)).

    Args:
        name: of the layer.
        matrix: checked, one scale group, rows of group g at g * R; its scales are prepared in place.
        weight_scale_2, input_scale: (1,) fp32.
        num_groups: G.
        head_dim, rope_dim: of a head, and rotated elements at its end.

    Attributes:
        workspace: of intermediate results.

    Raises:
        ValueError: R is no multiple of 8, head_dim no multiple of 64, rope_dim no multiple of 16; another GPU than sm_100;
            a misaligned weight.

    Numerics: as reference.wo_a, sums in another order. Graph-safe: as LinearChain.
    """

    def __init__(
        self,
        name: str,
        matrix: PackedMatrix,
        weight_scale_2: torch.Tensor,
        input_scale: torch.Tensor,
        num_groups: int,
        head_dim: int,
        rope_dim: int,
    ) -> None:
        self.num_groups, self.rank, self.d_in = num_groups, matrix.weight.shape[0] // num_groups, _k(matrix.weight)
        try:
            inverse_rope_quantize_sm100.Config(head_dim, rope_dim).validate()
        except ValueError as error:
            raise ValueError(f"{name}: the sm100 backend cannot rotate and quantize these heads: {error}") from error
        check_gpu(name, matrix.weight.device, CAPABILITY, _BACKEND)
        _check_sizes(name, "a group of wo_a", self.rank, self.d_in)
        check_alignment(name, "wo_a", matrix.weight, matrix.weight_scale, backend=_BACKEND)
        self.input_scale = input_scale
        self.operand = prepare.prepare_experts(
            matrix.weight.view(num_groups, self.rank, -1),
            matrix.weight_scale.view(num_groups, self.rank, -1),
            weight_scale_2.expand(num_groups),
            input_scale.expand(num_groups),
        )
        self.workspace = workspace("wo_a", matrix.weight.device)
        self._groups = equal_groups(num_groups, matrix.weight.device)

    def __call__(self, o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor) -> torch.Tensor:
        """o (T, H, head_dim) bf16, positions (T,) int64, cos_sin_cache (max_pos, rope_dim) fp32 -> (T, G * R) bf16."""
        num_tokens = o.shape[0]
        out = o.new_empty(num_tokens, self.num_groups * self.rank)
        if num_tokens == 0:
            return out
        padded_tokens = padded_shape(num_tokens, 0)[0]
        rows = self.num_groups * padded_tokens
        codes, scales = _activation(self.workspace, "x", rows, self.d_in)
        y = self.workspace.take("y", torch.bfloat16, rows, self.rank)
        inverse_rope_quantize_sm100.inverse_rope_quantize(
            o, positions, cos_sin_cache, self.input_scale, self.num_groups, codes, scales
        )
        grouped_gemm(codes, scales, self.operand, self._groups.of(num_tokens), y)
        # The GEMM's rows are group by group, the op's token by token.
        by_group = y.view(self.num_groups, padded_tokens, self.rank)[:, :num_tokens]
        out.view(num_tokens, self.num_groups, self.rank).copy_(by_group.transpose(0, 1))
        return out


def linear_gemm(codes: torch.Tensor, scales: torch.Tensor, operand: Operand, group: Groups, out: torch.Tensor) -> None:
    """out = bf16(alpha * (codes @ W^T)), with operands swapped if there are few rows.

    Args:
        codes: (m, k/2) uint8.
        scales: (m up to 128, k/16 up to 4) e4m3 - swizzled.
        operand: of one expert.
        group: one, of m rows.
        out: (m, n) bf16.
    """
    if _is_small(group):
        _swap(codes, scales, operand, group, out, epilogue=BF16)
        return
    weight, weight_scale = operand.weight[0], operand.weight_scale[0]
    linear_sm100.linear(codes, weight, scales, weight_scale, operand.alpha.view(-1), out)


def grouped_gemm(
    codes: torch.Tensor, scales: torch.Tensor, operand: Operand, groups: Groups, out: torch.Tensor
) -> None:
    """Rows of group e of out = bf16(alpha * (codes @ W[e]^T)), with operands swapped if groups have few rows.

    Args:
        codes: (P, k/2) uint8.
        scales: (P, k/16 up to 4) e4m3 - swizzled.
        operand: of all groups.
        groups: rows.
        out: (P, n) bf16; rows of padding may be written.
    """
    if _is_small(groups):
        _swap(codes, scales, operand, groups, out, epilogue=BF16)
        return
    _grouped(codes, scales, operand, groups, out, epilogue=BF16)


def swiglu_gemm(
    codes: torch.Tensor,
    scales: torch.Tensor,
    operand: Operand,
    groups: Groups,
    limit: float | None,
    h_codes: torch.Tensor,
    h_scales: torch.Tensor,
    h_scale: torch.Tensor,
) -> None:
    """Rows of group e of h_codes, h_scales = quantize_activation(swiglu(alpha * (codes @ W[e]^T)), h_scale[e]).

    Args:
        codes, scales, operand, groups: as grouped_gemm takes them; gate and up rows interleaved.
        limit: of SwiGLU, or None.
        h_codes: (P, n/4) uint8; rows of padding may be written.
        h_scales: (P, n/32 up to 4) e4m3 - swizzled.
        h_scale: (E,) fp32.
    """
    run = _swap if _is_small(groups) else _grouped
    run(
        codes, scales, operand, groups, h_codes,
        epilogue=SWIGLU_NVFP4, mSFD=h_scales, h_scale=h_scale, limit=limit,
    )  # fmt: skip


def check_linear(name: str, label: str, matrix: PackedMatrix) -> None:
    """Checks that the kernels can compute a linear, before anything is changed.

    Raises:
        ValueError: as LinearChain.
    """
    check_gpu(name, matrix.weight.device, CAPABILITY, _BACKEND)
    for group in matrix.scale_groups:
        for start, end in group.row_spans:
            _check_sizes(name, label, end - start, _k(matrix.weight))
    check_alignment(name, label, matrix.weight, matrix.weight_scale, backend=_BACKEND)


def _is_small(groups: Groups) -> bool:
    return groups.tokens <= SWAP_TOKENS


def _swap(
    codes: torch.Tensor, scales: torch.Tensor, operand: Operand, groups: Groups, out: torch.Tensor, **epilogue: Any
) -> None:
    grouped_gemm_swap_sm100.grouped_gemm_swap(
        codes, operand.weight, scales, operand.weight_scale, operand.alpha, groups.count, groups.padded_offset, out,
        tokens=groups.tokens, **epilogue,
    )  # fmt: skip


def _grouped(
    codes: torch.Tensor, scales: torch.Tensor, operand: Operand, groups: Groups, out: torch.Tensor, **epilogue: Any
) -> None:
    grouped_gemm_sm100.grouped_gemm(
        codes, operand.weight, scales, operand.weight_scale, operand.alpha, groups.tile_expert, groups.padded_offset, out,
        **epilogue,
    )  # fmt: skip


def _activation(buffers: Workspace, name: str, rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns codes (rows, k/2) and swizzled scales (rows up to 128, k/16 up to 4) in the workspace."""
    padded = padded_shape(rows, k // NVFP4.block_size)
    return (
        buffers.take(f"{name} codes", torch.uint8, rows, k // NVFP4.codes_per_byte),
        buffers.take(f"{name} scales", NVFP4.scale_dtype, *padded),
    )


def _k(weight: torch.Tensor) -> int:
    return weight.shape[-1] * NVFP4.codes_per_byte


def _check_sizes(name: str, label: str, n: int, k: int) -> None:
    if k % linear_sm100.K_MULTIPLE or n % linear_sm100.N_MULTIPLE:
        raise ValueError(
            f"{name}: {label} has a part of {n} rows with K = {k} on this rank, the sm100 backend takes multiples of "
            f"{linear_sm100.N_MULTIPLE} and {linear_sm100.K_MULTIPLE}; use another tensor-parallel size or backend"
        )
