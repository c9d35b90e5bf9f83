"""What GAN training does to a normalised model: where other implementations go wrong."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import genkern


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 6, 3), nn.Linear(6, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.conv(x)).mean((2, 3))).squeeze(1)


def layers(model):
    return [model.conv, model.last]


def twins(dtype=torch.double):
    """The same model normalised by genkern as a whole, and by torch layer by layer."""
    torch.manual_seed(3)
    ours = Net().to(dtype)
    theirs = copy.deepcopy(ours)
    torch.manual_seed(5)
    genkern.spectral_norm(ours, recurse=True)
    torch.manual_seed(5)
    for layer in layers(theirs):
        parametrizations.spectral_norm(layer)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def images(dtype=torch.double):
    return torch.randn(4, 2, 5, 5, dtype=dtype)


def vectors(model):
    return [p for name, p in model.state_dict().items() if name.endswith(("_u", "_v"))]


def assert_same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **tolerance)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **tolerance)


# ---- Steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", ["each", "sum"])
def test_a_discriminators_steps_with_fused_adam(backward):
    """Fused optimizers change weights without moving their version counters."""
    models = twins()
    optimizers = [torch.optim.Adam(m.parameters(), 0.02, fused=True) for m in models]
    for _ in range(3):
        real, fake = images(), images()
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            if backward == "each":
                model(real).square().mean().backward()
                (-model(fake).mean()).backward()
            else:
                (model(real).square().mean() - model(fake).mean()).backward()
            optimizer.step()
        assert_same(*models)


def test_a_step_before_the_backward_of_an_earlier_forward():
    """torch's parametrization raises here: it saves the weight that the step changes."""
    ours, theirs = twins()
    x = images()
    first = ours(x).mean()
    first.backward(retain_graph=True)
    optimizer = torch.optim.Adam(ours.parameters(), 0.1, fused=True)
    optimizer.step()
    optimizer.zero_grad()
    first.backward()
    theirs(x).mean().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@given(st.lists(st.sampled_from(["train", "eval", "data", "no_grad", "copy"]), max_size=6))
@settings(max_examples=25, deadline=None)
def test_any_sequence_of_uses(uses):
    """Weights changed by `.data`, forwards without gradients, in eval mode, of a copy: as torch."""
    ours, theirs = twins()
    for use in uses:
        x = images()
        if use == "data":
            for model in (ours, theirs):
                model.conv.parametrizations.weight.original.data[0] *= 3
        elif use == "copy":
            ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
        else:
            ours.train(use != "eval"), theirs.train(use != "eval")
            with torch.set_grad_enabled(use != "no_grad"):
                torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_eval_mode_leaves_the_vectors_alone():
    ours, _ = twins()
    before = [v.clone() for v in vectors(ours)]
    ours.eval()
    ours(images()).sum().backward()
    with genkern.use_backend("reference"):
        ours(images())
    assert all(torch.equal(v, b) for v, b in zip(vectors(ours), before, strict=True))


def test_an_average_of_the_model():
    """Its u and v are copied: averaged ones are shorter than 1 and underestimate σ."""
    ours, _ = twins()
    average = genkern.nn.averaged(ours, 0.9)
    optimizer = torch.optim.SGD(ours.parameters(), 0.5)
    for _ in range(30):
        ours(images()).square().mean().backward()
        optimizer.step()
        average.update_parameters(ours)
    for v, own in zip(vectors(average.module), vectors(ours), strict=True):
        assert torch.equal(v, own)
        torch.testing.assert_close(v.norm().item(), 1.0)
    assert not torch.equal(average.module.last.bias, ours.last.bias)
    with genkern.explain() as log:
        average(images())
    assert len(log) == 1
    for v, own in zip(vectors(average.module), vectors(ours), strict=True):
        assert torch.equal(v, own)


def test_a_layer_called_with_another_weight_inside_the_forward():
    """As maml and FSDP do: what the whole model's call has is not that weight's."""

    class Called(Net):
        def forward(self, x):
            other = {"parametrizations.weight.original": torch.ones_like(self.last.weight)}
            last = self.last.eval()
            return torch.func.functional_call(last, other, torch.tanh(self.conv(x)).mean((2, 3)))

    model = genkern.spectral_norm(Called().double(), recurse=True)
    p, x = model.last.parametrizations.weight[0], images()
    got = model(x)
    sigma = p._u @ torch.ones(1, 6, dtype=torch.double) @ p._v
    features = torch.tanh(model.conv.eval()(x)).mean((2, 3))
    torch.testing.assert_close(got, (features.sum(1) / sigma + model.last.bias)[:, None])


# ---- Autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """σ in fp32: the weights are those of a forward without autocast, rounded by the layers."""
    ours, _ = twins(torch.float32)
    plain = copy.deepcopy(ours)
    x = images(torch.float32)
    read = []
    for model, enabled in ((ours, True), (plain, False)):
        handle = model.last.register_forward_pre_hook(lambda m, args: read.append(m.weight))
        with torch.autocast("cpu", dtype, enabled=enabled):
            model(x).float().sum().backward()
        handle.remove()
    assert read[0].dtype == torch.float32
    assert torch.equal(*read)
    assert all(torch.equal(a, b) for a, b in zip(vectors(ours), vectors(plain), strict=True))
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad, rtol=0.1, atol=0.02)


# ---- torch's cache ------------------------------------------------------------------------------


def test_cached():
    """Inside it the first forward's weights serve all: u and v move once, gradients add up."""
    ours, theirs = twins()
    x, y = images(), images()
    for model in (ours, theirs):
        with parametrize.cached():
            (model(x).square().mean() - model(y).mean()).backward()
    assert_same(ours, theirs)
    with parametrize.cached(), genkern.explain() as log:
        for _ in range(3):
            ours(x)
    assert len(log) == 1
    with genkern.explain() as log:
        ours(x), ours(x)
    assert len(log) == 2


def test_cached_reading_before_a_forward():
    ours, theirs = twins()
    for model in (ours, theirs):
        with parametrize.cached():
            weight = model.last.weight
            model(images())
            assert model.last.weight is weight
    torch.testing.assert_close(vectors(ours), vectors(theirs))


# ---- R1 and compilers ---------------------------------------------------------------------------


def r1_loss(model, x):
    logits = model(x)
    (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return slope.square().sum() + logits.square().sum()


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this torch compiles no torch.autograd.grad",
)
def test_r1_inside_a_compiled_loss():
    """What torch can: the whole loss in one graph, its penalty's gradient inside."""
    ours, eager = twins()
    x = images().requires_grad_()
    r1_loss(eager, x).backward()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(lambda x: r1_loss(ours, x), backend="aot_eager", fullgraph=True)
        compiled(x).backward()
    assert_same(ours, eager)


def test_r1_through_a_compiled_model_is_refused_by_torch():
    """What torch can't; were it dropped without a word, the penalty would vanish."""
    ours, _ = twins()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        r1_loss(compiled, images().requires_grad_()).backward()


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_compiled_part_of_a_model(how):
    """Its weights are normalised by the compiled code, the others together: one step each."""
    ours, theirs = twins()
    if how == "in place":
        ours.conv.compile(backend="eager")
    else:
        ours.conv = torch.compile(ours.conv, backend="eager")
    for _ in range(2):
        x = images()
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(vectors(ours), vectors(theirs))
    copied = copy.deepcopy(ours)
    torch.testing.assert_close(copied(x), theirs(x))


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 compiles no checkpoint here")
def test_a_compiled_checkpoint_is_refused_by_torch():
    """It would repeat the power step from vectors that the forward has already replaced."""
    ours, _ = twins()
    compiled = torch.compile(
        lambda x: checkpoint(ours, x, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
        compiled(images())
    ours.eval()
    torch._dynamo.reset()
    x = images()
    torch.testing.assert_close(compiled(x), ours(x))
