"""The errors of genkern.nn.MultiheadAttention: torch's types, our sentences."""

import pytest
import torch
from torch import nn

from genkern.nn import MultiheadAttention


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def arguments(query=(2, 3, 8), key=(2, 4, 8), value=(2, 4, 8), **options):
    return [zeros(*query), zeros(*key), zeros(*value)], options


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    ("case", "name"),
    [
        (arguments(query=(1, 2, 3, 8)), "query"),
        (arguments(key=(4, 8)), "key"),
        (arguments(value=(4, 8)), "value"),
        (arguments(query=(3, 8)), "key"),
        (arguments(query=(2, 3, 6)), "query"),
        (arguments(key=(2, 4, 6)), "key"),
        (arguments(key=(2, 4, 6), value=(2, 4, 6)), "key"),
        (arguments(value=(2, 5, 8)), "value"),
        (arguments(value=(1, 4, 8)), "value"),
        (arguments(key=(3, 4, 8), value=(3, 4, 8)), "key"),
        (arguments(attn_mask=zeros(3, 5)), "attn_mask"),
        (arguments(attn_mask=zeros(2, 3, 4)), "attn_mask"),
        (arguments(attn_mask=zeros(4)), "attn_mask"),
        (arguments(attn_mask=zeros(2, 2, 3, 4)), "attn_mask"),
        (arguments(attn_mask=zeros(3, 4, dtype=torch.int64)), "attn_mask"),
        (arguments((3, 8), (4, 8), (4, 8), attn_mask=zeros(3, 3, 4)), "attn_mask"),
        (arguments((3, 8), (4, 8), (4, 8), attn_mask=zeros(3, 3)), "attn_mask"),
        (arguments(key_padding_mask=zeros(4)), "key_padding_mask"),
        (arguments(key_padding_mask=zeros(2, 3)), "key_padding_mask"),
        (arguments(key_padding_mask=zeros(3, 4)), "key_padding_mask"),
        (arguments(key_padding_mask=zeros(2, 4, dtype=torch.uint8)), "key_padding_mask"),
        (arguments((3, 8), (4, 8), (4, 8), key_padding_mask=zeros(1, 4)), "key_padding_mask"),
        (arguments(key_padding_mask=zeros(2, 4, dtype=torch.float64)), "key_padding_mask"),
        (arguments(attn_mask=zeros(3, 4, dtype=torch.bfloat16)), "attn_mask"),
        (arguments(is_causal=True), "attn_mask"),
    ],
)
def test_errors_are_of_torchs_types(case, name, need_weights):
    inputs, options = case
    layers = [kind(8, 2, batch_first=True) for kind in (nn.MultiheadAttention, MultiheadAttention)]
    errors = []
    for layer in layers:
        with pytest.raises(Exception) as caught:
            layer(*inputs, **options, need_weights=need_weights)
        errors.append(caught)
    assert errors[1].type is errors[0].type
    assert errors[1].match(f"^MultiheadAttention: {name} must ")


def test_errors_with_separate_weights():
    for key, value in (((2, 4, 6), (2, 4, 5)), ((2, 4, 7), (2, 4, 6)), ((2, 4, 7), (2, 3, 5))):
        (query, *others), _ = arguments(key=key, value=value)
        for kind in (nn.MultiheadAttention, MultiheadAttention):
            with pytest.raises(AssertionError):
                kind(8, 2, batch_first=True, kdim=7, vdim=5)(query, *others)


def test_nested_tensors_are_refused():
    x = torch.nested.nested_tensor([zeros(3, 8), zeros(2, 8)], layout=torch.jagged)
    with pytest.raises(AssertionError, match="must be plain tensors"):
        MultiheadAttention(8, 2, batch_first=True)(x, x, x)


@pytest.mark.parametrize(("sizes", "error"), [((0, 2), ValueError), ((9, 2), AssertionError)])
def test_constructor_errors_are_torchs(sizes, error):
    with pytest.raises(error):
        MultiheadAttention(*sizes)
