"""How exact attention is, all passes: its errors are those of eager PyTorch in the same dtype, or
hardly more. What is exact is computed in NumPy's long double. For the tests of every backend."""

import functools
import math

import numpy as np
import torch

import genkern

FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# How much larger than eager's an error may be, as root mean square over a result and the draws: of
# values and first gradients; of second-order gradients and tangents. The largest single error
# hangs on one rounding: it may be twice that.
FIRST, SECOND = 1.25, 2.0


def eager(
    q, k, v, bias=None, *, is_causal=False, scale=None, window=None, softcap=None, similarity="dot"
):
    """As people write it, every step in the tensors' own dtype. Distances by the three products, a
    matrix product among them."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if similarity == "l2":
        products = 2 * (q @ k.transpose(-2, -1))
        squares = q.square().sum(-1, keepdim=True) + k.square().sum(-1).unsqueeze(-2)
        logits = (products - squares) * scale
    else:
        logits = q @ k.transpose(-2, -1) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    options = {"is_causal": is_causal, "window": window}
    logits = logits.masked_fill(~allowed(*logits.shape[-2:], options), -torch.inf)
    return logits.softmax(-1) @ v


def allowed(queries, keys, options):
    left, right = options.get("window") or (keys + queries, keys + queries)
    right = min(right, 0) if options.get("is_causal") else right
    place = torch.arange(keys) - torch.arange(queries)[:, None]
    return (place >= -left) & (place <= right)


def exact(inputs, cotangent, tangents, options):
    """name -> every result of every pass in long double, by the formulas of second.cpp, summed over
    whole rows. X = scale·q·kᵀ, and for distances scale·(2·q·kᵀ - ‖q‖² - ‖k‖²)."""
    wide = [x.double().numpy().astype(np.longdouble) for x in (*inputs, cotangent, *tangents)]
    q, k, v, *bias = wide[: len(inputs)]
    G, A, B, C, *bias_tangent = wide[len(inputs) :]
    distances = options.get("similarity") == "l2"
    scale = options.get("scale", 1 / math.sqrt(q.shape[-1])) * (2 if distances else 1)

    def turned(x):
        return x.swapaxes(-1, -2)

    def dots(x, y):
        return (x * y).sum(-1, keepdims=True)

    def to_queries(weights, q, k):
        own = weights.sum(-1, keepdims=True) * q if distances else 0
        return scale * (weights @ k - own)

    def to_keys(weights, q, k):
        return to_queries(turned(weights), k, q)

    X = scale * (q @ turned(k))
    T_X = scale * (A @ turned(k) + q @ turned(B))
    if distances:
        X = X - scale / 2 * (dots(q, q) + turned(dots(k, k)))
        T_X = T_X - scale * (dots(A, q) + turned(dots(B, k)))
    softcap = options.get("softcap")
    tanh = np.tanh(X / softcap) if softcap else np.zeros_like(X)
    slope, curvature = 1 - tanh**2, -2 * (1 - tanh**2) * tanh / (softcap or 1)
    S, T = softcap * tanh if softcap else X, slope * T_X
    if bias:
        S, T = S + bias[0], T + bias_tangent[0]
    S = np.where(allowed(*S.shape[-2:], options).numpy(), S, -np.inf)
    P = np.exp(S - S.max(-1, keepdims=True))
    P = P / P.sum(-1, keepdims=True)
    dP, U = G @ turned(v), G @ turned(C)
    dP = dP - dots(P, dP)
    T = T - dots(P, T)
    dS, PT, E = P * dP, P * T, T * dP + U
    W = P * (E - dots(P, E))
    dS_X, W_X = slope * dS, slope * W + curvature * dS * T_X
    found = {"out": P @ v, "dq": to_queries(dS_X, q, k), "dk": to_keys(dS_X, q, k)}
    found |= {"dv": turned(P) @ G, "tangent": P @ C + PT @ v, "second v": turned(PT) @ G}
    found["second q"] = to_queries(W_X, q, k) + to_queries(dS_X, A, B)
    found["second k"] = to_keys(W_X, q, k) + to_keys(dS_X, A, B)
    found["second dO"] = found["tangent"]
    return found | ({"dbias": dS, "second bias": W} if bias else {})


def fused(*tensors, **options):
    return genkern.attention(*tensors, **options)


def results(function, inputs, cotangent, tangents, options):
    """name -> every result of every pass."""
    names = ["q", "k", "v", "bias"][: len(inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    cotangent = cotangent.detach().requires_grad_()
    out = function(*leaves, **options)
    first = torch.autograd.grad(out, leaves, cotangent, create_graph=True)
    second = torch.autograd.grad(first, [*leaves, cotangent], tangents)
    _, tangent = torch.func.jvp(lambda *x: function(*x, **options), tuple(inputs), tuple(tangents))
    found = {"out": out, "tangent": tangent}
    found |= {f"d{name}": x for name, x in zip(names, first, strict=True)}
    return found | {f"second {name}": x for name, x in zip([*names, "dO"], second, strict=True)}


def problem(case, dtype, draw):
    """(inputs, cotangent, tangents, options) of one of CASES, rounded to dtype."""
    (B, H, N, M, d, dv), change, options = CASES[case]
    random = torch.Generator().manual_seed(1000 * draw + sum(map(ord, case)))

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64, generator=random)

    inputs = [normal(B, H, N, d), normal(B, H, M, d), normal(B, H, M, dv)]
    inputs = list(change(*inputs))
    if "bias" in case:
        inputs.append(3 * normal(1, H, N, M))
    tangents = [normal(*x.shape) for x in inputs]
    cotangent = normal(B, H, N, dv)
    inputs, (cotangent, *tangents) = (
        [x.to(dtype) for x in list_] for list_ in (inputs, (cotangent, *tangents))
    )
    return inputs, cotangent, tangents, options


def same(q, k, v):
    return q, k, v


def peaked(spread):
    return lambda q, k, v: (spread * q, spread * k, v)


def drifting(q, k, v):
    """The running maximum rises at every key: all that was summed before must shrink. The keys that
    count are all near 100, and dq is a difference of them."""
    M = k.shape[-2]
    return 1 + q / 10, torch.linspace(-100, 100, M)[:, None].expand_as(k).to(k), v


def of_mean(mean):
    return lambda q, k, v: (q, k + mean, v + mean)


# name -> (B, H, N, M, d, dv), what is done to q, k, v, options. The shapes are ragged around lanes,
# blocks and tiles.
SHAPE = (1, 2, 70, 150, 24, 17)
CASES = {
    "one of everything": ((1, 1, 1, 1, 1, 1), same, {}),
    "few": ((2, 3, 5, 7, 3, 9), same, {}),
    "SAGAN": ((1, 1, 129, 97, 24, 96), same, {}),
    "wide heads": ((1, 1, 65, 65, 130, 70), same, {}),
    "long": ((1, 1, 300, 257, 16, 24), same, {}),
    "causal": (SHAPE, same, {"is_causal": True}),
    "window": (SHAPE, same, {"window": (20, 9)}),
    "flat": (SHAPE, peaked(0), {}),
    "peaked": (SHAPE, peaked(10), {}),
    "peaked, causal": (SHAPE, peaked(10), {"is_causal": True}),
    "large logits": (SHAPE, same, {"scale": 50.0}),
    "drifting keys": ((1, 2, 70, 300, 4, 4), drifting, {}),
    "mean of 10": (SHAPE, of_mean(10.0), {}),
    "mean of 100": (SHAPE, of_mean(100.0), {}),
    "bias": (SHAPE, same, {}),
    "softcap": (SHAPE, peaked(3), {"softcap": 2.0}),
    "softcap and bias, causal": (SHAPE, peaked(3), {"softcap": 5.0, "is_causal": True}),
    "distances": (SHAPE, same, {"similarity": "l2"}),
    "distances, mean of 3": (SHAPE, of_mean(3.0), {"similarity": "l2"}),
}


@functools.cache
def without_kernels(case, dtype, draw):
    """What eager gives, and what is exact: the same at every level."""
    args = problem(case, dtype, draw)
    return results(eager, *args), exact(*args)


def squared_errors(got, right):
    """The mean and the largest."""
    squares = np.square(got.detach().double().numpy().astype(np.longdouble) - right)
    return squares.mean(), squares.max()


def report(case, dtype, draws, run):
    """name -> root mean square and largest error, eager's two, and the size of the result, over so
    many draws; run(function, inputs, cotangent, tangents, options): `results`, on a backend."""
    rows = {}
    for draw in range(draws):
        rough, right = without_kernels(case, dtype, draw)
        got = run(fused, *problem(case, dtype, draw))
        assert got.keys() == rough.keys() == right.keys()
        for name, e in right.items():
            assert got[name].dtype == dtype and got[name].shape == e.shape
            row = (
                *squared_errors(got[name], e),
                *squared_errors(rough[name], e),
                np.square(e).max(),
            )
            rows.setdefault(name, []).append(row)
    return {
        name: [
            math.sqrt(reduce([row[i] for row in found]))
            for i, reduce in enumerate((np.mean, np.max, np.mean, np.max, np.max))
        ]
        for name, found in rows.items()
    }


def assert_errors_are_eagers(found, dtype):
    """found: a report."""
    for name, (ours, our_worst, theirs, their_worst, size) in found.items():
        said = f"{name}: {ours:.2g}, {our_worst:.2g}, eager {theirs:.2g}, {their_worst:.2g}"
        if math.isnan(theirs):
            # Eager's logits left half precision's range.
            assert dtype == torch.float16 and math.isfinite(ours), said
            continue
        ratio = FIRST if name in ("out", "dq", "dk", "dv", "dbias") else SECOND
        floor = FLOOR[dtype] * max(size, 1.0)
        assert ours <= max(ratio * theirs, floor), f"{said}, size {size:.2g}"
        assert our_worst <= max(2 * ratio * their_worst, floor), f"{said}, size {size:.2g}"
