"""Sorting by expert and summing back, against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutedsl.routing import Routing, local_expert_ids, reduce_slots, sort_by_expert


def check(ids: torch.Tensor, num_experts: int, routing: Routing) -> None:
    """Every expert's slots are its choices in order; the rest follow in order."""
    flat, top_k = ids.flatten().tolist(), ids.shape[1]
    expected, offsets = [], [0]
    for expert in range(num_experts):
        expected += [choice for choice, found in enumerate(flat) if found == expert]
        offsets.append(len(expected))
    expected += [choice for choice, found in enumerate(flat) if not 0 <= found < num_experts]
    assert routing.slot_choice.tolist() == expected
    assert routing.expert_offset.tolist() == offsets
    assert routing.slot_token.tolist() == [choice // top_k for choice in expected]
    assert {t.dtype for t in routing} == {torch.int64}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"), [(0, 6, 8), (1, 1, 1), (1, 6, 256), (37, 6, 384), (64, 8, 4)]
)
def test_sort_equals_loop(dtype: torch.dtype, tokens: int, top_k: int, num_experts: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, num_experts, (tokens, top_k), generator=generator).to(dtype)
    check(ids, num_experts, sort_by_expert(ids, num_experts))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 4), min_size=3, max_size=3), max_size=12))
def test_sort_equals_loop_for_any_ids(rows: list[list[int]]) -> None:
    ids = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), 3)
    check(ids, 4, sort_by_expert(ids, 4))


def test_all_choices_elsewhere() -> None:
    routing = sort_by_expert(torch.full((3, 2), -1), 5)
    assert routing.expert_offset.tolist() == [0] * 6
    assert routing.slot_choice.tolist() == list(range(6))


def test_reduce_equals_loop_and_ignores_rows_of_no_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 3, (9, 4), generator=generator)
    weights = torch.rand(9, 4, generator=generator)
    routing = sort_by_expert(ids, 3)
    y = torch.randn(36, 5, generator=generator)
    y[int(routing.expert_offset[-1]) :] = float("nan")
    expected = torch.zeros(9, 5)
    for slot, choice in enumerate(routing.slot_choice.tolist()):
        expected[choice // 4] += 0 if ids.view(-1)[choice] < 0 else weights.view(-1)[choice] * y[slot]
    result = reduce_slots(y, routing, weights)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_reduce_adds_in_the_order_of_the_choices() -> None:
    # 1e8 + 1 is 1e8 in fp32: only the order tells the two tokens apart, whatever experts they chose.
    ids = torch.tensor([[2, 0, 1], [1, 2, 0]])
    routing = sort_by_expert(ids, 3)
    terms = torch.tensor([[1e8, -1e8, 1.0], [1.0, 1e8, -1e8]])
    y = terms.flatten()[routing.slot_choice].unsqueeze(1)
    assert reduce_slots(y, routing, torch.ones(2, 3)).flatten().tolist() == [1.0, 0.0]


def test_a_row_does_not_depend_on_the_batch_around_it() -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 7, (20, 6), generator=generator)
    weights, terms = torch.rand(20, 6, generator=generator), torch.randn(120, 33, generator=generator)
    routing = sort_by_expert(ids, 7)
    whole = reduce_slots(terms[routing.slot_choice], routing, weights)
    for token in range(20):
        alone = sort_by_expert(ids[token : token + 1], 7)
        y = terms[token * 6 : token * 6 + 6][alone.slot_choice]
        assert torch.equal(reduce_slots(y, alone, weights[token : token + 1])[0], whole[token])


def test_reduce_of_an_empty_batch() -> None:
    routing = sort_by_expert(torch.zeros(0, 6, dtype=torch.int32), 4)
    assert reduce_slots(torch.zeros(0, 8), routing, torch.zeros(0, 6)).shape == (0, 8)


def test_local_ids_keep_minus_one() -> None:
    expert_map = torch.tensor([-1, 0, -1, 1], dtype=torch.int32)
    ids = torch.tensor([[0, 1, 2], [3, -1, -1]])
    assert local_expert_ids(ids, expert_map).tolist() == [[-1, 0, -1], [1, -1, -1]]
    assert local_expert_ids(ids, None) is ids
    with pytest.raises(IndexError):
        local_expert_ids(ids + 1, expert_map)


def test_sort_by_expert_raises() -> None:
    with pytest.raises(TypeError, match=r"topk_ids are torch\.float32"):
        sort_by_expert(torch.zeros(2, 2), 4)
    with pytest.raises(ValueError, match=r"expected \(tokens, top_k\)"):
        sort_by_expert(torch.zeros(4, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="num_experts is 0"):
        sort_by_expert(torch.zeros(2, 2, dtype=torch.int32), 0)


def test_reduce_slots_raises() -> None:
    routing = sort_by_expert(torch.zeros(2, 3, dtype=torch.int64), 4)
    with pytest.raises(TypeError, match=r"y is torch\.bfloat16"):
        reduce_slots(torch.zeros(6, 8, dtype=torch.bfloat16), routing, torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"topk_weights torch\.float64"):
        reduce_slots(torch.zeros(6, 8), routing, torch.zeros(2, 3, dtype=torch.float64))
    for y, weights in (((5, 8), (2, 3)), ((6,), (2, 3)), ((6, 8), (3, 3)), ((6, 8), (6,))):
        with pytest.raises(ValueError, match="for 6 slots"):
            reduce_slots(torch.zeros(y), routing, torch.zeros(weights))
