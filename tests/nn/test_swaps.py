"""Public models with their attention swapped for genkern's: same outputs, same gradients.

The models come from transformers, with random weights. Their eager attention takes its softmax in
fp32 even where the model is fp64 (all but GPT-2's): that is the tolerance.
"""

import pytest
import torch

import genkern

transformers = pytest.importorskip(
    "transformers", reason="transformers, whose models are swapped here, is not installed"
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_TEXT = {
    "vocab_size": 50,
    "intermediate_size": 32,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    **SMALL,
}
LAYERS = 2


def with_contrast(model):
    """Weights five times as large as at the start of training: attention that looks at something,
    not at everything alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 5
    return model


def gpt2(dropout=0.0):
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=32,
        n_embd=24,
        n_layer=LAYERS,
        n_head=3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def vit():
    config = transformers.ViTConfig(intermediate_size=32, image_size=16, patch_size=4, **SMALL)
    return transformers.ViTForImageClassification(config)


def llama():
    """Grouped queries."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL_TEXT))


def gemma2():
    """A softcap, and a sliding window in every other layer."""
    config = transformers.Gemma2Config(
        head_dim=8, sliding_window=4, attn_logit_softcapping=2.0, **SMALL_TEXT
    )
    return transformers.Gemma2ForCausalLM(config)


def t5():
    """A learned bias of positions, which every layer adds, and attention over another sequence."""
    config = transformers.T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=LAYERS,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.fixture(autouse=True)
def registered():
    genkern.nn.register_with_transformers()


def images():
    return {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}


def tokens(**more):
    return {"input_ids": torch.randint(0, 50, (2, 12)), **more}


def padded():
    return tokens(attention_mask=(torch.arange(12) < torch.tensor([[12], [9]])).long())


def both_sequences():
    return {**padded(), "labels": torch.randint(0, 50, (2, 7))}


def with_attention(model, name, inputs):
    """Logits where nothing is padded, the gradients of all weights, and what genkern ran."""
    model.set_attn_implementation(name)
    with genkern.explain() as log:
        logits = model(**inputs).logits
        if "labels" not in inputs and "attention_mask" in inputs:
            logits = logits[inputs["attention_mask"].bool()]
        loss = logits.log_softmax(-1).square().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return (logits, grads), [(choice.op, choice.backend) for choice in log]


def expected_log(calls):
    return [("attention", "cpu")] * calls + [("attention.backward", "cpu")] * calls


@pytest.mark.parametrize(
    ("build", "make_inputs", "tolerance", "calls"),
    [
        (gpt2, tokens, 1e-11, LAYERS),
        (gpt2, padded, 1e-11, LAYERS),
        (vit, images, 1e-5, LAYERS),
        (llama, tokens, 1e-4, LAYERS),
        (llama, padded, 1e-4, LAYERS),
        (gemma2, tokens, 1e-4, LAYERS),
        (t5, both_sequences, 1e-4, 3 * LAYERS),
    ],
)
def test_same_logits_and_gradients(build, make_inputs, tolerance, calls):
    model = with_contrast(build().double())
    inputs = make_inputs()
    expected, nothing = with_attention(model, "eager", inputs)
    got, ran = with_attention(model, "genkern", inputs)
    assert nothing == []
    assert ran == expected_log(calls)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_r1_through_a_vit():
    """Two derivatives of a public model, which its default, SDPA, does not give on every path."""
    model = with_contrast(vit().double())
    x = images()["pixel_values"].requires_grad_()
    weights = [w for name, w in model.named_parameters() if "attention" in name]
    assert weights
    penalties = []
    for name in ("eager", "genkern"):
        model.set_attn_implementation(name)
        with genkern.explain() as log:
            out = model(x).logits.square().sum()
            (slope,) = torch.autograd.grad(out, x, create_graph=True)
            penalties.append(torch.autograd.grad(slope.square().sum(), weights))
    torch.testing.assert_close(penalties[1], penalties[0], rtol=1e-4, atol=1e-6)
    assert [choice.op for choice in log].count("attention.second") == LAYERS
    assert {choice.backend for choice in log} == {"cpu"}


def test_generates_the_same_text():
    """With a cache of keys: one query, then more keys than queries."""
    model = with_contrast(gpt2()).eval()
    texts = []
    for name in ("eager", "genkern"):
        model.set_attn_implementation(name)
        texts.append(model.generate(**tokens_of_one(), max_new_tokens=8, do_sample=False))
    assert torch.equal(*texts)


def tokens_of_one():
    return {
        "input_ids": torch.arange(4)[None],
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
        "pad_token_id": 0,
    }


def test_dropout_is_on_in_training_only():
    model = gpt2(dropout=0.5)
    model.set_attn_implementation("genkern")
    inputs = tokens()
    first, second = (model.train()(**inputs).logits for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (model.eval()(**inputs).logits for _ in range(2))
    assert torch.equal(first, second)


def test_sinks_are_refused():
    heads = torch.zeros(1, 1, 2, 4)
    function = transformers.AttentionInterface()["genkern"]
    with pytest.raises(NotImplementedError, match=r"s_aux .* choose another attn_implementation"):
        function(torch.nn.Module(), heads, heads, heads, None, s_aux=torch.zeros(1))
