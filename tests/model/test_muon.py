import pytest
import torch

from dpo_helpers.model.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape, gain", [((8, 8), 1.0), ((8, 32), 2.0), ((32, 8), 1.0)])
def test_all_singular_values_are_made_alike(shape, gain):
    left, right = (
        torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(i)))[0] for i in (1, 2)
    )
    matrix = torch.zeros(shape)
    matrix[:8, :8] = left @ torch.diag(torch.arange(1.0, 9.0)) @ right  # singular values 1 to 8
    singular = torch.linalg.svdvals(orthogonalize(matrix)) / gain
    assert singular.min() > 0.6 and singular.max() < 1.25


def test_query_key_and_value_are_treated_alone():
    parts = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    together = orthogonalize(torch.cat([parts[0], 100 * parts[1], parts[2]], dim=1))
    assert torch.allclose(together, torch.cat([orthogonalize(part) for part in parts], dim=1), atol=1e-4)


def test_a_step_goes_against_the_gradient_and_its_length_is_the_rate():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.diag(torch.tensor([3.0, -3.0]))
    Muon([weight], lr=0.1).step()
    assert weight[0, 0] < 0 < weight[1, 1] and weight[0, 1] == weight[1, 0] == 0
    assert weight.diagonal().abs().tolist() == pytest.approx([0.1, 0.1], rel=0.35)
