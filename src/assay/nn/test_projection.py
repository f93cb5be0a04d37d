import pytest
import torch
import torch.nn.functional as F

from assay.nn import ProjectionHead


@pytest.mark.parametrize("hidden", [None, 7])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 2, 3)])
def test_it_is_the_formula(hidden, shape):
    torch.manual_seed(0)
    head = ProjectionHead(4, 3, hidden_features=hidden).double()
    x = torch.randn(*shape, 4, dtype=torch.float64)
    rows = x.reshape(-1, 4)
    if hidden:
        z = rows @ head.hidden[0].weight.T
        z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
        rows = z.clamp(min=0)
    expected = (rows @ head.out.weight.T + head.out.bias).view(*shape, 3)
    torch.testing.assert_close(head(x), F.normalize(expected, dim=-1), rtol=1e-10, atol=1e-12)
    head.normalize = False
    torch.testing.assert_close(head(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["in_features", "out_features", "hidden_features"])
def test_widths_out_of_range_are_named(name):
    with pytest.raises(ValueError, match=f"{name} = 0 is out of range"):
        ProjectionHead(**{"in_features": 4, "out_features": 3, name: 0})
