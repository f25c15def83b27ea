"""The sm90 backends: each operator as a chain of kernels on one stream, with nothing of PyTorch between them.

    linear         round -> GEMM, for each distinct input_scale; or one GEMM on x itself
    shared expert  round -> grouped GEMM (one group; SwiGLU, round) -> GEMM
    MoE            route -> round or copy (gather) -> grouped GEMM (SwiGLU, round) -> grouped GEMM -> finalize
    wo_a           inverse RoPE, round -> grouped GEMM, whose groups are columns of the result

Hopper multiplies BF16. To round, above, is to quantize to NVFP4 and keep the BF16 numbers code * block scale: so the function
is that of the sm100 backend. Activations "bf16" leave rounding out: x is the GEMM's operand as it is, h is BF16.

The hard part is memory: an operand in BF16 is 3.6 times as large as in NVFP4, and gathered rows of experts, each expert's
padded to 128, are by far the largest. They are held once: what the second GEMM of a MoE gives takes the place of what the
first one read. For the rest, and for what CUDA graphs need, see `cutedsl.runners.workspace`.

A chain takes over the weights: they are prepared in place (`cutedsl.prepare_sm90`) and mean nothing to other backends from
then on. What its kernels cannot do is refused before anything is changed.

Verified on one H200: docs/evidence/h200.
"""

from typing import Any

import torch

from cutedsl import prepare_sm90
from cutedsl.formats import NVFP4
from cutedsl.kernels import (
    finalize_sm90,
    grouped_gemm_sm90,
    inverse_rope_quantize_sm90,
    quantize_sm90,
    route_sm90,
)
from cutedsl.kernels.grouped_gemm_sm90 import BF16, SWIGLU, SWIGLU_NVFP4
from cutedsl.kernels.hopper import TMA_BYTES
from cutedsl.layout import TILE_ROWS, padded_shape
from cutedsl.prepare_sm90 import Operand
from cutedsl.reference.linear import PackedMatrix
from cutedsl.runners import BF16 as BF16_ACTIVATIONS
from cutedsl.runners import check_alignment, check_gpu, check_one_scale
from cutedsl.runners.workspace import Groups, Workspace, equal_groups, expected_hit, large_group, workspace

# In messages.
_BACKEND = "sm90"
# The kernels are compiled for sm_90a, which runs on nothing else.
CAPABILITY = (9, 0)


class LinearChain:
    """bf16(alpha * (Q(x) @ W^T)), or without Q as the matrix says.

    Args:
        name: of the layer.
        matrix: checked; codes and scales are prepared in place.

    Attributes:
        workspace: of intermediate results.

    Raises:
        ValueError: the rows of a shard are no multiple of 8; another GPU than sm_90; a misaligned weight.

    Numerics: as reference.linear, sums in another order. Graph-safe: yes, after one call of at least this batch.
    """

    def __init__(self, name: str, matrix: PackedMatrix) -> None:
        _check_matrix(name, "the matrix", matrix)
        self.out_features, self.in_features = matrix.weight.shape[0], _k(matrix.weight)
        self.groups = prepare_sm90.prepare_linear(matrix)
        self.workspace = workspace("linear", matrix.weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, K) bf16 -> (M, N) bf16."""
        m = x.shape[0]
        out = x.new_empty(m, self.out_features)
        if m == 0:
            return out
        for group in self.groups:
            a = _operand(self.workspace, x, group.input_scale)
            for start, end, operand in group.spans:
                grouped_gemm(self.workspace, a, operand, None, out[:, start:end])
        return out

    def quantize(self, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """x (M, K) bf16 -> the same, rounded for the one group there is."""
        (group,) = self.groups
        a = x.new_empty(x.shape)
        quantize_sm90.round_rows(x, group.input_scale, a)
        return a

    def multiply(self, a: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """What `quantize` gives -> (M, N) bf16."""
        ((_, ((_, _, operand),)),) = self.groups
        out = a.new_empty(a.shape[0], self.out_features)
        if a.shape[0]:
            grouped_gemm(self.workspace, a, operand, None, out)
        return out


class SharedExpertChain:
    """bf16(down(swiglu(gate_up(x)))).

    Args:
        name: of the layer.
        gate_up: checked; prepared in place, rows too.
        down: checked, for the same activations; prepared in place.
        gate_up_weight_scale_2: (2,) fp32.
        gate_up_input_scale: (2,) fp32 - equal for gate and up, if activations are quantized.
        limit: of SwiGLU, or None.

    Attributes:
        workspace: of intermediate results.

    Raises:
        ValueError: gate and up have different input scales to quantize with; another GPU than sm_90; a misaligned weight.

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
        for label, matrix in (("gate_up", gate_up), ("down", down)):
            _check_matrix(name, label, matrix)
        alpha = gate_up_weight_scale_2
        self.input_scale: torch.Tensor | None = None
        if gate_up.scale_groups:
            check_one_scale(name, gate_up_input_scale.unsqueeze(0), _BACKEND)
            self.input_scale = gate_up_input_scale[:1]
            alpha = gate_up_input_scale * alpha
        self.hidden, self.intermediate, self.limit = _k(gate_up.weight), _k(down.weight), limit
        self.gate_up = prepare_sm90.prepare_experts(
            gate_up.weight.unsqueeze(0), gate_up.weight_scale.unsqueeze(0), alpha.unsqueeze(0), gate_up=True
        )
        ((self.h_scale, ((_, _, self.down),)),) = prepare_sm90.prepare_linear(down)
        self.workspace = workspace("shared_expert", down.weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, H) bf16 -> (M, H) bf16."""
        m = x.shape[0]
        out = x.new_empty(m, self.hidden)
        if m == 0:
            return out
        a = _operand(self.workspace, x, self.input_scale)
        h = self.workspace.take("h", torch.bfloat16, m, self.intermediate)
        swiglu_gemm(self.workspace, a, self.gate_up, None, self.limit, h, self.h_scale)
        grouped_gemm(self.workspace, h, self.down, None, out)
        return out


class MoeChain:
    """bf16(sum over j of topk_weights[t, j] * expert[topk_ids[t, j]](x[t])).

    Args:
        name: of the layer.
        w13_weight, w13_weight_scale: (E, 2I, H/2) uint8, (E, 2I, H/16) e4m3 - checked; prepared in place, rows too.
        w13_weight_scale_2, w13_input_scale: (E, 2) fp32 - the latter equal for gate and up of an expert, if activations
            are quantized.
        w2_weight, w2_weight_scale: (E, H, I/2) uint8, (E, H, I/16) e4m3 - checked; prepared in place.
        w2_weight_scale_2, w2_input_scale: (E,) fp32.
        expert_map: (num_global_experts,) int32 or int64, or None.
        limit: of SwiGLU, or None.
        activations: of `runners.ACTIVATIONS`.

    Attributes:
        workspace: of intermediate results.

    Raises:
        ValueError: an expert's gate and up have different input scales to quantize with; there are more than 512 experts;
            another GPU than sm_90; a misaligned weight.

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
        activations: str,
    ) -> None:
        self.num_experts = w13_weight.shape[0]
        if self.num_experts > grouped_gemm_sm90.MAX_EXPERTS:
            raise ValueError(
                f"{name}: there are {self.num_experts} experts on this rank, the sm90 backend takes at most "
                f"{grouped_gemm_sm90.MAX_EXPERTS}; use more ranks"
            )
        check_gpu(name, w13_weight.device, CAPABILITY, _BACKEND)
        check_alignment(name, "w13", w13_weight, w13_weight_scale, backend=_BACKEND)
        check_alignment(name, "w2", w2_weight, w2_weight_scale, backend=_BACKEND)
        w13_alpha, w2_alpha = w13_weight_scale_2, w2_weight_scale_2
        self.input_scale: torch.Tensor | None = None
        self.h_scale: torch.Tensor | None = None
        if activations != BF16_ACTIVATIONS:
            check_one_scale(name, w13_input_scale, _BACKEND)
            self.input_scale, self.h_scale = w13_input_scale[:, 0].contiguous(), w2_input_scale
            w13_alpha, w2_alpha = w13_input_scale * w13_alpha, w2_input_scale * w2_alpha
        self.hidden, self.intermediate, self.limit = _k(w13_weight), _k(w2_weight), limit
        self.num_global_experts = self.num_experts if expert_map is None else len(expert_map)
        self.expert_map = None if expert_map is None else expert_map.to(torch.int32).contiguous()
        self.w13 = prepare_sm90.prepare_experts(w13_weight, w13_weight_scale, w13_alpha, gate_up=True)
        self.w2 = prepare_sm90.prepare_experts(w2_weight, w2_weight_scale, w2_alpha)
        self.workspace = workspace("moe", w13_weight.device)

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """x (T, H) bf16, topk_weights (T, top_k) fp32, topk_ids (T, top_k) int32 or int64 -> (T, H) bf16."""
        out = x.new_empty(x.shape[0], self.hidden)
        if x.shape[0] == 0:
            return out
        take, compact = self.workspace.take, self.workspace.compact
        topk_weights, topk_ids = compact("weights", topk_weights), compact("ids", topk_ids)
        route = self._route(topk_ids)
        rows = len(route.tile_expert) * TILE_ROWS
        num_tokens, top_k = topk_ids.shape
        tokens = large_group(num_tokens, top_k, self.num_global_experts)
        num_hit = expected_hit(num_tokens, top_k, self.num_global_experts, self.num_experts)
        groups = Groups(route.tile_expert, route.padded_offset, route.count, tokens, num_hit=num_hit)
        a = take("rows", torch.bfloat16, rows, self.hidden)
        h = take("h", torch.bfloat16, rows, self.intermediate)
        self._gather(x, route, a)
        swiglu_gemm(self.workspace, a, self.w13, groups, self.limit, h, self.h_scale)
        # Nobody reads the gathered rows any more: y takes their place.
        y = a
        grouped_gemm(self.workspace, h, self.w2, groups, y)
        finalize_sm90.finalize(y, route.choice_row, topk_weights, None, out)
        return out

    def _route(self, topk_ids: torch.Tensor) -> route_sm90.Route:
        num_tokens, top_k = topk_ids.shape
        sizes = route_sm90.route_sizes(num_tokens, top_k, self.num_experts)._asdict()
        take = self.workspace.take
        route = route_sm90.Route(**{name: take(name, torch.int32, int(size)) for name, size in sizes.items()})
        route_sm90.route(topk_ids, self.expert_map, route)
        return route

    def _gather(self, x: torch.Tensor, route: route_sm90.Route, a: torch.Tensor) -> None:
        """Writes the row of each slot, rounded if activations are quantized."""
        slots = route.slot_token, route.slot_row, route.num_slots
        if self.input_scale is None:
            quantize_sm90.copy_slots(x, *slots, a)
        else:
            quantize_sm90.round_slots(x, self.input_scale, *slots, route.tile_expert, a)


class WoAChain:
    """bf16(alpha * (Q(inverse_rope(o)[t, g]) @ W[g]^T)), or without Q as the matrix says.

    Args:
        name: of the layer.
        matrix: checked, one scale group or none, rows of group g at g * R; prepared in place.
        weight_scale_2, input_scale: (1,) fp32.
        num_groups: G.
        head_dim, rope_dim: of a head, and rotated elements at its end.

    Attributes:
        workspace: of intermediate results.

    Raises:
        ValueError: R is no multiple of 8; the kernel cannot rotate heads of head_dim and rope_dim; another GPU than sm_90; a
            misaligned weight.

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
            inverse_rope_quantize_sm90.Config(BF16, head_dim, rope_dim).validate()
        except ValueError as error:
            raise ValueError(f"{name}: the sm90 backend cannot rotate these heads: {error}") from error
        _check_rows(name, "a group of wo_a", self.rank)
        check_gpu(name, matrix.weight.device, CAPABILITY, _BACKEND)
        check_alignment(name, "wo_a", matrix.weight, matrix.weight_scale, backend=_BACKEND)
        alpha, self.input_scale = weight_scale_2, None
        if matrix.scale_groups:
            alpha, self.input_scale = input_scale * alpha, input_scale
        self.operand = prepare_sm90.prepare_experts(
            matrix.weight.view(num_groups, self.rank, -1),
            matrix.weight_scale.view(num_groups, self.rank, -1),
            alpha.repeat(num_groups),
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
        a = self.workspace.take("x", torch.bfloat16, self.num_groups * padded_tokens, self.d_in)
        inverse_rope_quantize_sm90.inverse_rope(o, positions, cos_sin_cache, self.input_scale, self.num_groups, a)
        # A group's rows are the tokens again, next to the groups before it.
        place = {"d_group_rows": padded_tokens, "d_group_columns": self.rank}
        if self.num_groups == 1:
            grouped_gemm(self.workspace, a[:num_tokens], self.operand, None, out)
        else:
            grouped_gemm(self.workspace, a, self.operand, self._groups.of(num_tokens), out, **place)
        return out


def grouped_gemm(
    buffers: Workspace, a: torch.Tensor, operand: Operand, groups: Groups | None, out: torch.Tensor, **place: int
) -> None:
    """Rows of group e of out = bf16(alpha * (a @ W[e]^T)).

    Args:
        buffers: for sums that CTAs leave for each other.
        a: (P, k) bf16.
        operand: of all groups.
        groups: rows; None: one group has all of them.
        out: (P, n) bf16, rows may be strided; only the groups' rows are written.
        place: d_group_rows, d_group_columns of `grouped_gemm_sm90`.
    """
    _launch(buffers, a, operand, groups, out, epilogue=BF16, n=place.get("d_group_columns", out.shape[1]), **place)


def swiglu_gemm(
    buffers: Workspace,
    a: torch.Tensor,
    operand: Operand,
    groups: Groups | None,
    limit: float | None,
    h: torch.Tensor,
    h_scale: torch.Tensor | None,
) -> None:
    """Rows of group e of h = swiglu(alpha * (a @ W[e]^T)), rounded to NVFP4 with h_scale[e], or to BF16.

    Args:
        buffers, a, operand, groups: as grouped_gemm takes them; gate and up rows interleaved.
        limit: of SwiGLU, or None.
        h: (P, n/2) bf16; only the groups' rows are written.
        h_scale: (E,) fp32, or None.
    """
    epilogue = SWIGLU if h_scale is None else SWIGLU_NVFP4
    _launch(buffers, a, operand, groups, h, epilogue=epilogue, n=2 * h.shape[1], h_scale=h_scale, limit=limit)


def _launch(
    buffers: Workspace, a: torch.Tensor, operand: Operand, groups: Groups | None, out: torch.Tensor, **more: Any
) -> None:
    # Zeros from the start, and after each launch again.
    sums = buffers.take("sums", torch.int32, grouped_gemm_sm90.sums_elements(a.device))
    rows: dict[str, Any] = {"count": None, "padded_offset": None, "tokens": len(a)}
    if groups is not None:
        rows = {"count": groups.count, "padded_offset": groups.padded_offset, "tokens": groups.tokens}
        rows |= {"constant_rows": groups.constant, "num_hit": groups.num_hit}
    grouped_gemm_sm90.grouped_gemm(
        a, operand.weight, operand.weight_scale, operand.alpha, mD=out, sums=sums, **rows, **more
    )


def _operand(buffers: Workspace, x: torch.Tensor, input_scale: torch.Tensor | None) -> torch.Tensor:
    """x as the GEMM takes it: rounded to NVFP4, or itself, or a copy if its rows are strided or misaligned."""
    if input_scale is None and x.is_contiguous() and x.data_ptr() % TMA_BYTES == 0:
        return x
    a = buffers.take("x", torch.bfloat16, *x.shape)
    if input_scale is None:
        quantize_sm90.copy_rows(x, a)
    else:
        quantize_sm90.round_rows(x, input_scale, a)
    return a


def _k(weight: torch.Tensor) -> int:
    return weight.shape[-1] * NVFP4.codes_per_byte


def _check_matrix(name: str, label: str, matrix: PackedMatrix) -> None:
    """Checks that the kernels can compute a linear, before anything is changed.

    Raises:
        ValueError: as LinearChain.
    """
    check_gpu(name, matrix.weight.device, CAPABILITY, _BACKEND)
    spans = [span for group in matrix.scale_groups for span in group.row_spans] or [(0, matrix.weight.shape[0])]
    for start, end in spans:
        _check_rows(name, label, end - start)
    check_alignment(name, label, matrix.weight, matrix.weight_scale, backend=_BACKEND)


def _check_rows(name: str, label: str, n: int) -> None:
    multiple = grouped_gemm_sm90.N_MULTIPLE[BF16]
    if n % multiple:
        raise ValueError(
            f"{name}: {label} has a part of {n} rows on this rank, the sm90 backend takes multiples of {multiple}; use "
            "another tensor-parallel size or backend"
        )
