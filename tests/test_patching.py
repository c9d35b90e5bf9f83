"""genkern.patch on models written with torch's operations: same function, same weights, undone."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as imported_sdpa
from torch.nn.utils import spectral_norm as legacy
from torch.nn.utils.parametrizations import spectral_norm as parametrized

import genkern

SCALE = 1.0  # a global that an attention reads


def helper(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE)


class ByModule(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(query=x, key=x, value=x, is_causal=True)


class ByFullName(nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class ByImport(nn.Module):
    def forward(self, x):
        return imported_sdpa(x, x, x)


class ByHelper(nn.Module):
    def forward(self, x):
        return helper(x, x, x)


class ByMethod(nn.Module):
    @staticmethod
    def attend(x):
        return F.scaled_dot_product_attention(x, x, x)

    def forward(self, x):
        return (lambda y: self.attend(y) + F.scaled_dot_product_attention(y, y, y))(x)


class ByAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = F.scaled_dot_product_attention

    def forward(self, x):
        return self.attend(x, x, x)


class BySuper(ByModule):
    def forward(self, x):
        return 2 * super().forward(x)


class ByInheritance(ByModule):
    pass


class OwnMethod(nn.Module):
    """A method that is only called like torch's function."""

    def scaled_dot_product_attention(self, x):
        return x

    def forward(self, x):
        return self.scaled_dot_product_attention(x)


class Both(OwnMethod):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x) + self.scaled_dot_product_attention(x)


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class ByLocal(nn.Module):
    def forward(self, x):
        import torch.nn.functional as functional

        return functional.scaled_dot_product_attention(x, x, x)


class Discriminator(nn.Module):
    """Both of torch's forms of spectral norm, and two kinds of attention."""

    def __init__(self):
        super().__init__()
        self.conv = parametrized(nn.Conv2d(3, 8, 3))
        self.old = legacy(nn.Conv2d(8, 8, 1))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.functional = ByModule()
        self.logit = parametrized(nn.Linear(8, 1))

    def forward(self, x):
        tokens = self.old(F.silu(self.conv(x))).flatten(2).mT
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.logit(self.functional(tokens[:, None])[:, 0].mean(1))


def images():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def run(model, x):
    """Two forwards in training, the first one's gradients, and what ran."""
    with genkern.explain() as log:
        first, second = model(x), model(x)
        ran = [choice.op for choice in log]
    first.square().sum().backward()
    # By shape: the older form lists its parameters in another order.
    grads = sorted((p.grad for p in model.parameters()), key=lambda g: tuple(g.shape))
    model.zero_grad()
    return (first, second, *grads), ran


def heads():
    return torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("module", "calls"),
    [
        (ByModule, 1),
        (ByFullName, 1),
        (ByImport, 1),
        (ByHelper, 1),
        (ByMethod, 2),
        (ByAttribute, 1),
        (ByInheritance, 1),
    ],
)
def test_sdpa_is_reached(module, calls):
    module, x = module(), heads()
    before = type(module)
    expected = module(x)
    report = genkern.patch(module, verbose=False)
    assert [change.what for change in report.changed] == ["attention"] and not report.left
    with genkern.explain() as log:
        got = module(x)
    assert [(c.op, c.backend) for c in log] == [("attention", "cpu")] * calls
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    assert isinstance(module, before) and type(module).__name__ == before.__name__
    assert genkern.unpatch(module) is module
    with genkern.explain() as log:
        assert torch.equal(module(x), expected)
    assert not log and type(module) is before


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (BySuper, "super"),
        (Both, "two things in it are called scaled_dot_product_attention"),
        (Decorated, "a decorator hides it"),
        (ByLocal, "something local"),
    ],
)
def test_what_is_left_is_named(module, why):
    module, x = module(), heads()
    expected = module(x)
    report = genkern.patch(module, verbose=False)
    assert len(report.left) == 1 and why in report.left[0].why
    assert torch.equal(module(x), expected)
    assert "nothing to change" in str(report) and why in str(report)


def test_a_method_of_the_same_name_is_no_attention():
    report = genkern.patch(OwnMethod(), verbose=False)
    assert not report.changed and not report.left


def test_the_original_function_is_untouched(monkeypatch):
    """And the copy sees globals that change later."""
    module, other, x = ByHelper(), ByHelper(), heads()
    genkern.patch(module, verbose=False)
    with genkern.explain() as log:
        other(x)
        assert not log
        monkeypatch.setitem(globals(), "SCALE", 0.0)
        got = module(x)
    assert len(log) == 1
    torch.testing.assert_close(got, x.mean(2, keepdim=True).expand_as(x))


def test_a_whole_discriminator(capsys):
    model = Discriminator().double()
    twin, x = copy.deepcopy(model), images()
    parameters = {id(p) for p in model.parameters()}
    report = genkern.patch(model)
    # One call for each order of updates: the older hook begins with v.
    printed = "genkern.patch: 3 spectral norms → 2 calls, 2 attentions fused"
    assert capsys.readouterr().out == printed + "\n" == str(report) + "\n"
    assert [change.name for change in report.changed] == [
        "conv.weight",
        "old.weight",
        "logit.weight",
        "attention",
        "functional",
    ]
    assert {id(p) for p in model.parameters()} == parameters
    got, ran = run(model, x)
    expected, _ = run(twin, x)
    assert ran == ["spectral_norm", "spectral_norm", "attention", "attention"] * 2
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)

    genkern.unpatch(model)
    assert type(model.attention) is nn.MultiheadAttention
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-11, atol=1e-13)
    got, ran = run(model, x)
    assert not ran
    torch.testing.assert_close(got, run(twin, x)[0], rtol=1e-11, atol=1e-13)


def test_a_penalty_through_it():
    """Which torch's fused attention could not give."""
    model = Discriminator().double()
    genkern.patch(model, verbose=False)
    x = images()
    assert genkern.audit(model, x).ok
    genkern.losses.r1(model(x.requires_grad_()), x).backward()
    assert model.attention.in_proj_weight.grad.any()


def test_copies_and_files():
    model, x = Discriminator().double().eval(), images()
    genkern.patch(model, verbose=False)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with genkern.explain() as log:
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        assert [c.op for c in log] == ["spectral_norm", "spectral_norm", "attention", "attention"]
        genkern.unpatch(other)
        with genkern.explain() as log:
            torch.testing.assert_close(other(x), expected, rtol=1e-12, atol=1e-12)
        assert not log
    with genkern.explain() as log:
        model(x)
    assert len(log) == 4


def test_patching_twice_and_parts():
    model = Discriminator()
    assert len(genkern.patch(model, attention=False, verbose=False).changed) == 3
    assert len(genkern.patch(model, verbose=False).changed) == 2
    assert not genkern.patch(model, verbose=False).changed
    genkern.unpatch(model)
    assert type(model.attention) is nn.MultiheadAttention
    assert "old.weight_orig" in model.state_dict()
    genkern.unpatch(model)


def test_an_optimizer_goes_on():
    model = Discriminator()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    genkern.patch(model, verbose=False)
    before = [p.clone() for p in model.parameters()]
    model(images().float()).sum().backward()
    optimizer.step()
    assert all(
        not torch.equal(p, b)
        for p, b in zip(model.parameters(), before, strict=True)
        if p.grad.any()
    )


def test_compiled():
    module, x = ByHelper(), heads()
    expected = module(x)
    genkern.patch(module, verbose=False)
    torch._dynamo.reset()
    with genkern.explain() as log:
        got = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    assert "attention" in [c.op for c in log]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


def test_other_kinds_of_modules_are_left():
    class Mine(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict(
        {
            "scripted": torch.jit.script(nn.Linear(2, 2)),
            "mine": Mine(4, 2),
            "normal": parametrized(nn.Linear(2, 2)),
        }
    )
    report = genkern.patch(model, verbose=False)
    assert [left.name for left in report.left] == ["scripted", "mine"]
    assert "subclass of nn.MultiheadAttention" in str(report)
    with pytest.raises(TypeError, match=r"patch: model must be an nn\.Module, not list"):
        genkern.patch([])


def test_no_attention_kernel_on_the_device():
    report = genkern.patch(ByModule().to("meta"), verbose=False)
    assert len(report.changed) == 1  # nothing is on a device
    report = genkern.patch(nn.MultiheadAttention(4, 2, device="meta"), verbose=False)
    assert not report.changed and "its attention is on meta: there are no kernels for it" in str(
        report
    )


def flash_attn_func(q, k, v):
    return q


class Foreign(nn.Module):
    def forward(self, x):
        return flash_attn_func(x, x, x)


def test_foreign_attention_is_named(monkeypatch):
    monkeypatch.setattr(flash_attn_func, "__module__", "flash_attn.flash_attn_interface")
    report = genkern.patch(Foreign(), verbose=False)
    assert not report.changed
    assert "flash_attn_interface.flash_attn_func is not torch's" in str(report)


# ---- Libraries ----------------------------------------------------------------------------------


def test_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        attn_implementation="sdpa",
    )
    model = nn.ModuleDict({"vit": transformers.ViTModel(config).double().eval()})
    x = images()
    expected = model["vit"](x).last_hidden_state
    report = genkern.patch(model, verbose=False)
    assert "2 attentions fused" in str(report) and not report.left, str(report)
    with genkern.explain() as log:
        got = model["vit"](x).last_hidden_state
    assert [c.op for c in log] == ["attention"] * 2
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    genkern.unpatch(model)
    assert model["vit"].config._attn_implementation == "sdpa"


class TestDiffusers:
    @pytest.fixture
    def diffusers(self):
        return pytest.importorskip("diffusers", reason="diffusers is not installed")

    def unet(self, diffusers):
        return diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        ).double()

    def test_patch(self, diffusers):
        model, x = self.unet(diffusers), images()
        expected = model(x, 3).sample
        report = genkern.patch(model, verbose=False)
        assert "4 attentions fused" in str(report) and not report.left, str(report)
        with genkern.explain() as log:
            got = model(x, 3).sample
        assert [c.op for c in log] == ["attention"] * 4
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
        genkern.unpatch(model)
        with genkern.explain() as log:
            assert torch.equal(model(x, 3).sample, expected)
        assert not log

    def test_processor(self, diffusers):
        model, x = self.unet(diffusers), images()
        expected = model(x, 3).sample
        for module in model.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(genkern.nn.attention_processor())
        with genkern.explain() as log:
            got = model(x, 3).sample
        assert [c.op for c in log] == ["attention"] * 4
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("mask", [None, "boolean", "added"])
    def test_dispatched(self, diffusers, mask):
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        from genkern.nn.diffusers import dispatched_attention

        q, k, v = (torch.randn(2, n, 3, 4, dtype=torch.float64) for n in (5, 6, 6))
        seen = torch.arange(6) < torch.tensor([[6], [4]])
        mask = {None: None, "boolean": seen, "added": torch.randn(2, 6, dtype=torch.float64)}[mask]
        expected = dispatch_attention_fn(q, k, v, mask)
        torch.testing.assert_close(dispatched_attention(q, k, v, mask), expected)
        with pytest.raises(NotImplementedError, match="parallel_config"):
            dispatched_attention(q, k, v, parallel_config=object())

    def test_a_processor_without_attention(self, diffusers):
        with pytest.raises(ValueError, match="processor must call scaled_dot_product_attention"):
            genkern.nn.attention_processor(Discriminator())
