"""Weight coordinates: the target tensors themselves move."""

import pytest
import torch

from tests.cases import BY_NAME, outputs, train, wrap


@pytest.mark.parametrize("name", ["mlp", "norms", "recurrent"])
def test_weight_identity_is_full_fine_tuning(name):
    case = BY_NAME[name]
    model = wrap(case, projection="identity", d=None)
    plain = case.model()
    assert sum(p.numel() for p in plain.parameters()) == model.base_model.D
    train(model, case, steps=3)
    train(plain, case, steps=3)
    torch.testing.assert_close(outputs(model, case), outputs(plain, case), rtol=1e-3, atol=1e-4)
