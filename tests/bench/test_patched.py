"""The example of a patched discriminator: its promise of the same loss curve."""

import pytest
import torch

from genkern.bench import patched


@pytest.mark.parametrize(
    ("make", "norms"),
    [
        (lambda: patched.sngan(batch=4, width=8), 11),
        (lambda: patched.hifigan(batch=2, samples=512, width=16), 8),
    ],
    ids=["SNGAN-32", "HiFi-GAN MSD"],
)
def test_the_loss_curve_is_the_same(make, norms):
    """In fp64, where the curves of two equal models do not drift apart."""
    setting = make()
    setting = setting._replace(model=setting.model.double(), real=setting.real.double())
    result = patched.compare(setting, steps=8, lr=1e-3)
    assert f"{norms} spectral norms → 1 call" in result.report
    torch.testing.assert_close(result.curve, result.eager_curve, rtol=1e-8, atol=1e-8)
    assert result.curve[-1] < result.curve[0]
