"""genkern.spectral_norm(recurse=True): a whole model normalised in one call per forward."""

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import genkern


class Net(nn.Module):
    """Every kind of layer that recurse covers, one of them twice, and some that it leaves alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.mix = nn.Bilinear(8, 8, 2)
        self.fail = False

    def forward(self, x, y):
        if self.fail:
            raise ArithmeticError("forward failed")
        picture = self.up(self.conv(x)).mean((2, 3))
        token = self.again(self.shared(self.embed(y)))
        return self.mix(token, torch.cat([picture, picture], 1)).sum(1)


@pytest.fixture
def net():
    return genkern.spectral_norm(Net().double(), recurse=True)


def batch():
    return torch.randn(4, 3, 6, 6, dtype=torch.double), torch.randint(0, 10, (4,))


def assert_same_state(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for key, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[key], msg=lambda m, k=key: f"{k}: {m}")


# ---- A whole model ------------------------------------------------------------------------------


def test_one_call_a_forward_and_one_a_backward(net):
    inputs = batch()
    with genkern.explain() as log:
        net(*inputs).sum().backward()
    assert [(c.op, c.backend) for c in log] == [
        ("spectral_norm", "cpu"),
        ("spectral_norm.backward", "cpu"),
    ]


def test_the_model_is_as_torchs():
    """Outputs, gradients and buffers over some steps of training, then in eval mode."""
    torch.manual_seed(3)
    ours = Net().double()
    ours.again = nn.Linear(8, 8).double()  # torch would update a layer's vectors at every use
    theirs = copy.deepcopy(ours)
    torch.manual_seed(5)
    genkern.spectral_norm(ours, recurse=True)
    torch.manual_seed(5)
    for layer in list(theirs.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding, nn.Bilinear)):
            parametrizations.spectral_norm(layer)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (ours, theirs)]
    for _ in range(3):
        inputs = batch()
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append((model(*inputs) ** 2).mean())
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses)
        assert_same_state(ours, theirs)
    ours.eval(), theirs.eval()
    before = copy.deepcopy(ours.state_dict())
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def test_one_update_a_forward_however_often_a_weight_is_read(net):
    alone = copy.deepcopy(net.shared)
    net(*batch())
    alone.weight  # noqa: B018
    assert torch.equal(
        net.shared.parametrizations.weight[0]._u, alone.parametrizations.weight[0]._u
    )


def test_nothing_is_kept_for_the_next_forward(net):
    """Weights changed behind autograd's back count at once."""
    inputs = batch()
    net.eval()
    first = net(*inputs)
    with torch.no_grad():
        weight = net.mix.parametrizations.weight.original
        weight.data[0] += 1.0
    changed = net(*inputs)
    assert not torch.allclose(first, changed)
    expected = copy.deepcopy(net)
    expected.load_state_dict(net.state_dict())
    assert torch.equal(changed, expected(*inputs))


def test_reading_outside_a_forward_normalises_alone(net):
    with genkern.explain() as log:
        net.mix.weight, net.up.weight  # noqa: B018
    assert len(log) == 2


def test_two_forwards_then_backward_and_a_step_between(net):
    """The usual GAN step, D(real) and D(fake) before one backward; then, keeping the graph, the
    weights change and the same backward gives the same gradients."""
    other, inputs = copy.deepcopy(net), batch()
    with genkern.use_backend("reference"):
        ((other(*inputs) ** 2).mean() - other(*inputs).mean()).backward()
    loss = (net(*inputs) ** 2).mean() - net(*inputs).mean()
    for _ in range(2):
        loss.backward(retain_graph=True)
        for parameter, exact in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, exact.grad)
        net.zero_grad()
        with torch.no_grad():
            for layer in (net.embed, net.conv[0], net.up, net.shared, net.mix):
                layer.parametrizations.weight.original.add_(1.0)


def test_a_failing_forward_leaves_nothing_behind(net):
    net.fail = True
    with pytest.raises(ArithmeticError):
        net(*batch())
    with genkern.explain() as log:
        net.mix.weight  # noqa: B018
    assert len(log) == 1
    net.fail = False
    assert net(*batch()).isfinite().all()


def test_a_failing_hook_before_ours_does_not_disturb_an_outer_forward(net):
    """The inner model fails before its hook ran; the outer model's weights stay."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            with pytest.raises(ArithmeticError):
                self.inner(x)
            return self.first(x)

    outer = Outer()
    genkern.spectral_norm(outer.inner, recurse=True)
    genkern.spectral_norm(outer, recurse=True)

    def refuse(module, args):
        raise ArithmeticError

    outer.inner.register_forward_pre_hook(refuse, prepend=True)
    with genkern.explain() as log:
        outer(torch.randn(2, 3))
    assert len(log) == 1


def test_a_model_that_calls_itself(net):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, depth=1):
            first = self.layer.weight
            inner = self(x, depth - 1) if depth else x
            assert self.layer.weight is first
            return self.layer(inner)

    model = genkern.spectral_norm(Twice(), recurse=True)
    with genkern.explain() as log:
        model(torch.randn(2, 3))
    assert len(log) == 2


def test_two_threads(net):
    """Each forward finds its own weights."""
    net.eval()
    inputs = batch()
    expected, got = net(*inputs), {}

    def work(key):
        for _ in range(20):
            got[key] = net(*inputs)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(value, expected) for value in got.values())


def test_gradients_inside_a_forward_without_gradients():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            with torch.enable_grad():
                return self.layer(x)

    model = genkern.spectral_norm(Inner(), recurse=True)
    with torch.no_grad():
        output = model(torch.randn(2, 3))
    output.sum().backward()
    assert model.layer.parametrizations.weight.original.grad is not None


def test_layers_that_are_already_normalised_are_left(net):
    before = list(net.state_dict())
    with pytest.raises(ValueError, match="has no Linear"):
        genkern.spectral_norm(net, recurse=True)
    other = Net()
    parametrizations.spectral_norm(other.mix)
    genkern.spectral_norm(other, recurse=True)
    assert len(other.mix.parametrizations.weight) == 1
    assert list(other.state_dict()) == before


def test_mixed_dtypes_and_modes(net):
    """A layer in bf16 and one in eval mode: two calls, and the eval one keeps its vectors."""
    net.mix.eval()
    net.up.float()
    mix = net.mix.parametrizations.weight[0]
    before = mix._u.clone(), net.shared.parametrizations.weight[0]._u.clone()
    net.conv.register_forward_hook(lambda m, a, out: out.float())
    net.up.register_forward_hook(lambda m, a, out: out.double())
    with genkern.explain() as log:
        net(*batch())
    assert len(log) == 2
    assert torch.equal(mix._u, before[0])
    assert not torch.equal(net.shared.parametrizations.weight[0]._u, before[1])


def test_inside_cached(net):
    """torch's own cache: the first forward's weights serve all."""
    with parametrize.cached(), genkern.explain() as log:
        weight = net.mix.weight
        net(*batch())
        assert net.mix.weight is weight
    assert log


# ---- Copies -------------------------------------------------------------------------------------


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(net, how):
    """A copy is a model of its own, and still takes one call."""
    inputs = batch()
    net(*inputs)
    other = COPIES[how](net)
    assert_same_state(net, other)
    with genkern.explain() as log:
        got = other(*inputs)
    assert len(log) == 1
    before = copy.deepcopy(net.state_dict())
    other(*inputs)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    torch.testing.assert_close(got, net(*inputs))


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_one_layer(how):
    layer = genkern.spectral_norm(nn.Linear(4, 3))
    other = COPIES[how](layer)
    assert torch.equal(layer.weight, other.weight)
    parametrize.remove_parametrizations(other, "weight")
    assert type(other) is nn.Linear
    assert layer.weight.shape == (3, 4)  # torch's copies share a class, and lose it together


# ---- Memory -------------------------------------------------------------------------------------


def test_memory_is_lent_again_only_when_nothing_holds_it():
    model = genkern.spectral_norm(nn.Sequential(nn.Linear(600, 600, bias=False)), recurse=True)
    seen = []

    def read():
        kept = []
        handle = model[0].register_forward_pre_hook(lambda m, a: kept.append(m.weight))
        model(torch.ones(1, 600))
        handle.remove()
        return kept[0]

    for _ in range(4):
        weight = read()
        seen.append(weight.data_ptr())
        del weight
        gc.collect()
    assert len(set(seen)) == 1
    held = [read() for _ in range(3)]
    values = [w.detach().clone() for w in held]
    assert len({w.data_ptr() for w in held}) == 3
    view = held.pop().detach()[5:].numpy()  # holds the storage, no longer the tensor
    for _ in range(5):
        read().sum().backward()
    assert all(torch.equal(w, v) for w, v in zip(held, values, strict=False))
    assert (torch.from_numpy(view) == values[-1][5:]).all()


def test_gradients_keep_their_memory():
    model = genkern.spectral_norm(nn.Sequential(nn.Linear(600, 600, bias=False)), recurse=True)
    (parameter,) = model.parameters()
    x = torch.randn(2, 600)
    model(x).square().sum().backward()
    first = parameter.grad
    expected = first.clone()
    parameter.grad = None
    for _ in range(3):
        model(x).sum().backward()
    assert torch.equal(first, expected)


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("recurse", [False, True])
def test_compile(recurse):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    for layer in [model] if recurse else [model[0], model[2]]:
        genkern.spectral_norm(layer, recurse=recurse)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, 6).double()
    for _ in range(2):
        got, expected = compiled(x), eager(x)
        torch.testing.assert_close(got, expected)
        got.sum().backward()
        expected.sum().backward()
    assert_same_state(model, eager)
    for p, e in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, e.grad)


def test_r1_through_a_model(net):
    """The penalty's gradient, in fp64, against the reference."""
    other, (x, y) = copy.deepcopy(net), batch()
    x.requires_grad_()
    grads = []
    for model, backend in ((net, "cpu"), (other, "reference")):
        with genkern.use_backend(backend):
            genkern.losses.r1(model(x, y), x, gamma=10).backward()
        grads.append([p.grad for p in model.parameters()])
    for got, exact in zip(*grads, strict=True):
        assert (got is None) == (exact is None)
        if got is not None:
            torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-12)
