"""Attention on several threads: the same bits on any number of its own, from run to run, and from
several Python threads at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import genkern

# name -> (B, H, Hk, N, M, d, dv), the shape of the bias or None, options. One head of many blocks
# of queries; many heads; every bias whose gradient is summed over something.
PROBLEMS = {
    "one head": ((1, 1, 1, 700, 300, 24, 32), None, {}),
    "one head, causal": ((1, 1, 1, 500, 500, 16, 16), None, {"is_causal": True}),
    "many heads": ((3, 4, 2, 100, 130, 16, 9), None, {"window": (40, 20)}),
    "bias": ((2, 4, 2, 100, 130, 16, 8), (2, 4, 100, 130), {}),
    "bias for all": ((2, 4, 2, 100, 130, 16, 8), (1, 1, 100, 130), {"is_causal": True}),
    "bias of a query": ((2, 4, 2, 100, 130, 16, 8), (2, 4, 100, 1), {"softcap": 2.0}),
    "bias of a key": ((2, 4, 2, 300, 130, 16, 8), (2, 4, 1, 130), {}),
    "key bias": ((2, 4, 2, 300, 130, 16, 8), (2, 1, 1, 130), {}),
    "one bias": ((2, 4, 2, 300, 130, 16, 8), (1, 1, 1, 1), {}),
    "dropout": ((1, 4, 2, 200, 130, 16, 8), (1, 4, 200, 130), {"dropout_p": 0.3}),
}


def results(problem, dtype=torch.float32, forward_mode=False):
    """All results of all passes; of forward mode where asked for."""
    (B, H, Hk, N, M, d, dv), bias, options = problem
    random = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=random).to(dtype)

    inputs = [normal(B, H, N, d), normal(B, Hk, M, d), normal(B, Hk, M, dv)]
    inputs += [normal(*bias)] if bias else []
    tangents = [normal(*x.shape) for x in inputs]
    cotangents = [normal(B, H, N, dv).requires_grad_(), normal(B, H, N).to(torch.float32)]

    def call(*x):
        return genkern.attention(*x, enable_gqa=True, return_lse=True, **options)

    torch.manual_seed(1)  # of dropout
    leaves = [x.requires_grad_() for x in inputs]
    outs = call(*leaves)
    first = torch.autograd.grad(outs, leaves, cotangents, create_graph=True)
    second = torch.autograd.grad(first, [*leaves, cotangents[0]], tangents)
    found = [*outs, *first, *second]
    if forward_mode:
        torch.manual_seed(1)
        found += torch.func.jvp(call, tuple(x.detach() for x in inputs), tuple(tangents))[1]
    return [x.detach() for x in found]


def same_bits(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_same_bits_on_any_number_of_threads(name, cpu_level):
    before = torch.get_num_threads()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            found = []
            for count in (1, 2, 3, 5, 2):
                torch.set_num_threads(count)
                with genkern.explain() as log:
                    found.append(results(PROBLEMS[name], dtype, forward_mode=True))
                assert {choice.backend for choice in log} == {"cpu"}
            assert all(same_bits(found[0], other) for other in found[1:])
    finally:
        torch.set_num_threads(before)


def test_from_several_python_threads(threads):
    """Different problems at once, and everyone the same. Left out are dropout, whose seeds come
    from the generator that all threads share, and forward mode, which torch itself has once for all
    threads; its kernel is among those of tests/native."""
    problems = [p for name, p in PROBLEMS.items() if name != "dropout"]
    expected = [results(p) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        for found in (
            pool.map(results, problems * 2),
            pool.map(results, [p for p in problems for _ in range(4)]),
        ):
            found = list(found)
            each = len(found) // len(problems)
            order = range(len(found))
            which = [i % len(problems) if each == 2 else i // each for i in order]
            assert all(same_bits(found[i], expected[which[i]]) for i in order)


def test_python_goes_on_meanwhile():
    """A launch lets other Python threads run."""
    x = torch.randn(1, 1, 6000, 32)
    done = threading.Event()

    def work():
        genkern.attention(x, x, x)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    turns = 0
    while not done.wait(0.001):
        turns += 1
    worker.join()
    # With the interpreter locked there would be one or two.
    assert turns > 10
