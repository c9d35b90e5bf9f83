"""genkern.audit on planted faults of each kind, each in its place, and on models without any."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import spectral_norm

import genkern


class Opaque(torch.autograd.Function):
    """A kernel whose backward autograd can't see into: the penalty vanishes without a word."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return ctx.x**2

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.x * grad.detach()


class Constant(Opaque):
    """Its second derivative in the cotangent is right, the one in x missing."""

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.x * grad


class Refusing(Opaque):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.x * grad


class Wrong(torch.autograd.Function):
    """Right in the first derivative; the second is that of another formula."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (x + x.detach() * 1.0) * grad * 1.0


class Calling(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def fused_attention(x):
    """Above torch's threshold for its fused kernel, in the layout that it takes."""
    tokens = x.flatten(2).mT.contiguous()[:, None]
    return F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].mT.reshape(x.shape)


class Discriminator(nn.Module):
    """What makes a second derivative hard to check: batch statistics, power iterations, dropout, a
    kink, a module that writes into its input, and one that is called twice."""

    def __init__(self, middle):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = middle
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(
            spectral_norm(nn.Conv2d(8, 8, 3, padding=1)), nn.LeakyReLU(0.2, inplace=True)
        )
        self.drop = nn.Dropout(0.3)
        self.logit = nn.Linear(8, 1)

    def forward(self, x, scale=1.0):
        x = self.middle(F.silu(self.first(scale * x)))
        x = self.body(self.body(self.norm(x)))
        return {"logits": [self.logit(self.drop(x.mean((2, 3))))], "features": None}


def images():
    return torch.randn(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("function", "kind", "why"),
    [
        (Opaque.apply, "missing", "dropped in it; its graph holds OpaqueBackward"),
        (Constant.apply, "missing", "its graph holds ConstantBackward"),
        (Wrong.apply, "wrong", "its graph holds WrongBackward"),
        (Refusing.apply, "raises", "once_differentiable"),
        (fused_attention, "raises", "scaled_dot_product_flash_attention"),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "nested"),
    [(torch.float64, False), (torch.float64, True), (torch.float32, True)],
)
def test_a_planted_fault_is_found_in_its_place(function, kind, why, dtype, nested):
    middle = Calling(function)
    model = Discriminator(nn.Sequential(nn.Tanh(), middle) if nested else middle)
    report = genkern.audit(model, images(), dtype=dtype)
    assert not report.ok and report.dtype == dtype
    (fault,) = report.faults
    assert (fault.module, fault.kind) == ("middle.1" if nested else "middle", kind)
    assert why in fault.why
    assert "R1's gradient is wrong" in str(report) and str(fault) in str(report)


def test_a_fault_in_the_models_own_code():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x):
            return Opaque.apply(self.linear(x)).sum(1)

    report = genkern.audit(Own(), torch.randn(2, 3))
    assert [fault.module for fault in report.faults] == [""]
    assert str(report.faults[0]).startswith("the model itself: second derivative wrong")


def test_two_faults_are_both_named():
    model = nn.Sequential(
        nn.Linear(3, 4), Calling(Wrong.apply), nn.Linear(4, 4), Calling(Opaque.apply)
    )
    report = genkern.audit(model, torch.randn(5, 3))
    assert [(f.module, f.kind) for f in report.faults] == [("1", "wrong"), ("3", "missing")]


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
    return nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 1))


CLEAN = {
    "nothing in the middle": lambda: (Discriminator(nn.Identity()), images()),
    "attention": lambda: (Discriminator(genkern.nn.SelfAttention2d(8)), images()),
    "L2 attention": lambda: (Discriminator(genkern.nn.L2SelfAttention2d(8, 2)), images()),
    "no kinks": lambda: (Discriminator(nn.SiLU()).eval(), images()),
    "kinks": lambda: (
        nn.Sequential(
            *[layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU())], nn.MaxPool1d(2)
        ),
        torch.randn(64, 64),
    ),
    "linear": lambda: (nn.Linear(3, 1), torch.randn(2, 3)),
    "nothing": lambda: (nn.Identity(), torch.randn(2, 3)),
}


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clean_models_are_not_blamed(name, dtype):
    model, x = CLEAN[name]()
    if "attention" in name:
        with torch.no_grad():
            for parameter in model.middle.parameters():
                parameter.copy_(torch.randn_like(parameter))  # gamma starts at 0
    report = genkern.audit(model, x, dtype=dtype)
    assert report.ok and not report.faults, str(report)
    if dtype == torch.float64:
        assert report.error < 1e-5
        assert "R1's gradient is right" in str(report)


def test_patching_mends_a_transformer():
    """Its attention is torch's fused one in training: no second derivative."""
    model, x = transformer(), torch.randn(2, 6, 3)
    report = genkern.audit(model, x)
    names = [f"1.layers.{i}.self_attn" for i in range(2)]
    assert [f.module for f in report.faults] == names, str(report)
    genkern.patch(model, verbose=False)
    report = genkern.audit(model, x)
    assert report.ok, str(report)


def test_a_whole_model_normalised_at_once():
    model = genkern.spectral_norm(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)), recurse=True
    )
    report = genkern.audit(model, images())
    assert report.ok, str(report)


def test_nothing_is_changed():
    model = Discriminator(nn.SiLU())
    for parameter in model.first.parameters():
        parameter.requires_grad_(False)
    x, before = images(), {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    genkern.audit(model, x, scale=torch.tensor(2.0))
    assert torch.equal(torch.rand(3), expected)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters()) and not x.requires_grad
    assert not model.first.weight.requires_grad and not model.first._forward_pre_hooks


def test_arguments():
    with pytest.raises(TypeError, match=r"audit: D must be an nn\.Module, not function"):
        genkern.audit(fused_attention, images())
    with pytest.raises(TypeError, match=r"audit: x must be a floating tensor, not torch\.int64"):
        genkern.audit(nn.Identity(), torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="audit: x must be a floating tensor, not list"):
        genkern.audit(nn.Identity(), [1.0])
    with pytest.raises(ValueError, match=r"audit: dtype must be torch\.float64 or torch\.float32"):
        genkern.audit(nn.Identity(), images(), dtype=torch.float16)
