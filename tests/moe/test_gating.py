"""The structured gate equals a dense table of all cells, and so do its gradients."""

import itertools

import pytest
import torch

from p2pmoe.moe.gating import Gate, balancing_loss, cell_scores, survivor_weights


@pytest.mark.parametrize("sizes", [(6,), (3, 4), (2, 3, 2)])
def test_the_gate_passes_gradcheck_against_the_dense_table_of_all_cells(sizes) -> None:
    torch.manual_seed(0)
    gate = Gate(5, sizes).double()
    x_TD = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    places_CI = torch.tensor(list(itertools.product(*map(range, sizes))))

    def table(x: torch.Tensor) -> torch.Tensor:
        scores = gate(x)
        return cell_scores(scores, places_CI.expand(len(x), *places_CI.shape))

    dense = torch.stack(
        [
            sum(part[:, at] for part, at in zip(gate(x_TD), place, strict=True))
            for place in places_CI
        ],
        dim=1,
    )
    assert torch.allclose(table(x_TD), dense)
    assert torch.autograd.gradcheck(table, (x_TD,))


def test_half_precision_scores_are_widened() -> None:
    gate = Gate(3, (2, 2)).half()
    assert all(part.dtype == torch.float32 for part in gate(torch.randn(1, 3)))
    assert [tuple(part.shape) for part in gate(torch.randn(5, 3))] == [(5, 2), (5, 2)]


def test_the_weights_of_those_that_answered_sum_to_one() -> None:
    scores_TK = torch.tensor([[1.0, 2.0, 900.0], [1.0, 1.0, 1.0], [5.0, 6.0, 7.0]])
    answered_TK = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    weights_TK = survivor_weights(scores_TK, answered_TK)
    assert torch.allclose(weights_TK.sum(1), torch.tensor([1.0, 1.0, 0.0]))
    assert torch.allclose(weights_TK[0, :2], torch.softmax(scores_TK[0, :2], 0))
    assert weights_TK[0, 2] == 0


def test_a_row_without_answers_has_no_gradient_and_no_nan() -> None:
    scores_TK = torch.randn(2, 3, requires_grad=True)
    answered_TK = torch.tensor([[True, True, False], [False, False, False]])
    (survivor_weights(scores_TK, answered_TK) * torch.randn(2, 3)).sum().backward()
    assert torch.isfinite(scores_TK.grad).all()
    assert not scores_TK.grad[1].any()
    assert scores_TK.grad[0, 2] == 0


def test_even_use_of_the_active_coordinates_gives_a_balancing_loss_of_one() -> None:
    places_CI = torch.tensor([[0, 0], [0, 1], [2, 0], [2, 1]])
    scores = (torch.zeros(4, 3), torch.zeros(4, 2))
    even_TKI = places_CI[:, None]
    assert balancing_loss(scores, even_TKI, places_CI) == pytest.approx(1.0)


def test_uneven_use_gives_a_higher_balancing_loss_whose_gradient_evens_it_out() -> None:
    places_CI = torch.tensor([[0], [1]])
    scores = (torch.tensor([[2.0, 0.0]] * 4, requires_grad=True),)
    loss = balancing_loss(scores, torch.zeros(4, 1, 1, dtype=torch.long), places_CI)
    assert loss > 1.5
    loss.backward()
    assert (scores[0].grad[:, 0] > 0).all()
    assert (scores[0].grad[:, 1] < 0).all()
