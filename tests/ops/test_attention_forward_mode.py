"""Forward mode by one kernel for out and tangent, beside the two kernels that the Functions call
one after the other: the same numbers, and who takes which way."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

import genkern

WITH_THE_FORWARD = "one kernel with the forward"
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def tensors(N, M, d, dv, dtype=torch.float32):
    shapes = (2, 2, N, d), (2, 2, M, d), (2, 2, M, dv)
    inputs = tuple(torch.randn(s).to(dtype) for s in shapes)
    return inputs, tuple(torch.randn_like(x) for x in inputs)


def ways_taken(function):
    with genkern.explain() as log:
        function()
    return {c.reason == WITH_THE_FORWARD for c in log if c.op == "attention.jvp"}


def by_one(function, inputs, tangents):
    assert ways_taken(lambda: jvp(function, inputs, tangents)) == {True}
    return [y for x in jvp(function, inputs, tangents) for y in (x if type(x) is tuple else (x,))]


def by_two(function, inputs, tangents):
    """Where somebody may yet want a gradient, there are Functions."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    assert ways_taken(lambda: jvp(function, inputs, tangents)) == {False}
    return [y for x in jvp(function, inputs, tangents) for y in (x if type(x) is tuple else (x,))]


def assert_near(got, expected, dtype, slack=2):
    """In root mean square, as a part of the tensor's."""
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape and g.stride() == e.stride() and torch.equal(*map(hidden, (g, e)))
        difference = (g - e).detach().double().nan_to_num(0).norm()
        size = e.detach().double().nan_to_num(0, 0, 0).norm()
        assert difference <= slack * TOLERANCE[dtype] * size, (difference / size).item()


def hidden(x):
    """Where lse is that of a row that sees nothing."""
    return x == -float("inf")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((7, 5, 3, 4), {}),
        ((70, 93, 40, 40), {"return_lse": True}),
        ((130, 130, 24, 24), {"is_causal": True}),
        ((190, 223, 33, 64), {"window": (9, 5), "return_lse": True}),
        ((100, 60, 16, 16), {"is_causal": True, "alignment": "lower_right", "return_lse": True}),
        ((60, 300, 64, 32), {"key_lengths": torch.tensor([270, 1])}),
        ((33, 65, 16, 16), {"softcap": 2.0}),
        ((40, 90, 16, 24), {"scale": -0.4, "return_lse": True}),
        ((20, 0, 8, 8), {"return_lse": True}),
        ((0, 20, 8, 8), {}),
    ],
)
def test_one_kernel_gives_what_two_give(dtype, sizes, options, cpu_level, poisoned):
    inputs, tangents = tensors(*sizes, dtype)
    call = lambda *x: genkern.attention(*x, **options)  # noqa: E731
    assert_near(by_one(call, inputs, tangents), by_two(call, inputs, tangents), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("growth", [3.0, 60.0, -60.0])
def test_maxima_that_come_late(growth, dtype, cpu_level):
    """Logits that rise by hundreds from tile to tile, and fall: what the first keys say of the
    maximum is far off."""
    inputs, tangents = tensors(64, 300, 32, 32, dtype)
    q, k, v = inputs
    k = k * 0.1
    k[..., 0] += (torch.arange(300) // 64 * growth).to(dtype)
    q = torch.cat([q[..., :1].abs() + 1, q[..., 1:]], -1)
    call = lambda *x: genkern.attention(*x, scale=1.0, return_lse=True)  # noqa: E731
    # Logits of hundreds are rounded to some 1e-5.
    one, two = (by(call, (q, k, v), tangents) for by in (by_one, by_two))
    assert_near(one, two, dtype, slack=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_some_tangents_alone(moving, dtype, cpu_level, poisoned):
    inputs, tangents = tensors(70, 80, 24, 40, dtype)

    def call(*moved):
        moved = dict(zip(moving, moved, strict=True))
        return genkern.attention(*(moved.get(i, x) for i, x in enumerate(inputs)))

    along = [inputs[i] for i in moving], [tangents[i] for i in moving]
    assert_near(by_one(call, *map(tuple, along)), by_two(call, *map(tuple, along)), dtype)


def test_dropout_and_biases(cpu_level, poisoned):
    inputs, tangents = tensors(50, 70, 16, 16)
    bias, key_bias = torch.randn(2, 1, 50, 70), torch.randn(2, 1, 1, 70)
    for mask in (bias, key_bias):

        def call(q, k, v, mask):
            torch.manual_seed(3)
            return genkern.attention(q, k, v, mask, dropout_p=0.3, return_lse=True)

        moved = (*inputs, mask), (*tangents, mask.cos())
        assert_near(by_one(call, *moved), by_two(call, *moved), torch.float32)


def test_results_do_not_depend_on_threads():
    before = torch.get_num_threads()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            inputs, tangents = tensors(300, 300, 32, 48, dtype)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(jvp(genkern.attention, inputs, tangents))
            for other in found[1:]:
                assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_duals_made_by_hand():
    inputs, tangents = tensors(9, 8, 4, 4)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        assert ways_taken(lambda: genkern.attention(*duals)) == {True}
        found = forward_ad.unpack_dual(genkern.attention(*duals))
        assert ways_taken(lambda: genkern.attention(*inputs)) == set()
    for x, y in zip(found, jvp(genkern.attention, inputs, tangents), strict=True):
        torch.testing.assert_close(x, y)


def test_other_derivatives_about_go_by_the_functions():
    inputs, tangents = tensors(9, 8, 4, 4)
    call = lambda *x: jvp(genkern.attention, x, tangents)[1].square().sum()  # noqa: E731
    assert ways_taken(lambda: grad(call)(*inputs)) == {False}
    watched = inputs[0].clone().requires_grad_()
    assert ways_taken(lambda: call(watched, *inputs[1:]).backward()) == {False}
    with torch.no_grad():
        assert ways_taken(lambda: call(watched, *inputs[1:])) == {True}
    batched = lambda: vmap(lambda *x: jvp(genkern.attention, x, x)[1])(*inputs)  # noqa: E731
    assert ways_taken(batched) == {False}
    with genkern.use_backend("reference"):
        expected = jvp(genkern.attention, inputs, tangents)
    torch.testing.assert_close(jvp(genkern.attention, inputs, tangents), expected)
