"""Test language models of Hugging Face that are cut into stages with readouts: training, gradients, files, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import autograd, nn

from sid_kernels import fused_local_loss
from sid_trainer import StageLossOptions, cut_language_model

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[recipes]'")

V, T, B = 40, 10, 3
COMMON = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "max_position_embeddings": 16,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GATED = COMMON | {"intermediate_size": 64, "num_key_value_heads": 2}
MODELS = {
    "gpt2": ("GPT2", COMMON | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "llama": ("Llama", GATED),
    "llama, tied": ("Llama", GATED | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", GATED),
    "phi": ("Phi", COMMON | {"intermediate_size": 64}),
    "opt": ("OPT", COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
}


def make_model(name="gpt2", **changes):
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{kind}LMHeadModel", None) or getattr(transformers, f"{kind}ForCausalLM")
    return model_class(getattr(transformers, f"{kind}Config")(**settings | changes))


def make_tokens(rows=B, length=T, vocabulary=V):
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def gradients(network, tokens):
    network.zero_grad()
    output = network(tokens, labels=tokens)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("readout", ["shared", "private"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_learns_and_is_saved_in_its_own_format(name, readout, tmp_path):
    model, tokens = make_model(name), make_tokens()
    names = list(model.state_dict())
    network = cut_language_model(model, 3, tokens, readout=readout, readout_blocks=1)
    assert not network.untrained and network.depth == 3
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        output = network(tokens, labels=tokens)
        output.loss.backward()
        optimizer.step()
        losses.append(output.stage_loss)
    assert bool((losses[-1] < losses[0] - 0.1).all())
    assert output.logits.shape == (0, V)
    assert list(model.state_dict()) == names
    assert not any(module._forward_hooks for module in model.modules())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    network.eval()
    logits = network(tokens)
    torch.testing.assert_close(loaded(tokens).logits, logits, rtol=0, atol=0)
    torch.testing.assert_close(network.stage_logits(tokens)[-1], logits)
    generated = loaded.generate(tokens[:, :4], attention_mask=torch.ones(B, 4), max_new_tokens=3, do_sample=False)
    assert generated.shape == (B, 7)
    assert torch.equal(generated[:, 4], loaded(tokens[:, :4]).logits[:, -1].argmax(1))


@pytest.mark.parametrize("readout", ["shared", "private"])
def test_losses_and_gradients_are_those_of_the_logits(readout):
    tokens = make_tokens()
    network = cut_language_model(make_model(), 2, tokens, readout=readout)
    network.loss_options = StageLossOptions(alpha=[1.0, 0.6], label_smoothing=0.1)
    output, own = gradients(network, tokens)
    first, last = network.stage_logits(tokens)
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    prior = torch.full_like(first, 1 / V)
    first_loss, belief, _, _ = fused_local_loss(first, prior, targets, 1.0, label_smoothing=0.1)
    last_loss = fused_local_loss(last, belief, targets, 0.6, label_smoothing=0.1).loss
    torch.testing.assert_close(output.stage_loss, torch.stack([first_loss, last_loss]).detach())
    for i, loss in enumerate((first_loss, last_loss)):
        parameters = network.parameters_of_stage(i)
        expected = autograd.grad(loss, parameters, retain_graph=True)
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(own[names[id(parameter)]], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("readout", ["shared", "private"])
def test_no_gradient_crosses_a_cut(readout):
    tokens = make_tokens()
    network = cut_language_model(make_model(), 3, tokens, readout=readout)
    _, before = gradients(network, tokens)
    for changed in range(3):
        alpha = [0.5] * 3
        alpha[changed] = 0.9
        network.loss_options = StageLossOptions(alpha=alpha)
        _, after = gradients(network, tokens)
        own = {id(parameter) for parameter in network.parameters_of_stage(changed)}
        for name, parameter in network.named_parameters():
            assert torch.equal(before[name], after[name]) == (id(parameter) not in own), name


def test_ignored_labels_and_padding_change_nothing():
    tokens = make_tokens()
    network = cut_language_model(make_model(), 2, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    padded, mask = F.pad(tokens, (0, 4)), F.pad(torch.ones_like(tokens), (0, 4))
    labels = F.pad(tokens, (0, 4), value=-100)
    expected = network(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens)
    output = network(input_ids=padded, attention_mask=mask, labels=labels)
    torch.testing.assert_close(output.stage_loss, expected.stage_loss)


def test_a_tied_weight_is_untied_and_a_frozen_one_stays_frozen():
    model = make_model("gpt2")
    model.transformer.wte.weight.requires_grad_(False)
    embedding = model.transformer.wte.weight
    network = cut_language_model(model, 2, make_tokens())
    assert model.lm_head.weight is not embedding and not model.lm_head.weight.requires_grad
    assert torch.equal(model.lm_head.weight, embedding)
    assert model.config.tie_word_embeddings is False
    _, own = gradients(network, make_tokens())
    assert own["model.lm_head.weight"] is None and own["model.transformer.wte.weight"] is None


def test_a_shared_readout_reads_the_weight_of_the_call_before():
    tokens = make_tokens()
    network = cut_language_model(make_model(), 2, tokens, readout_refresh=2)
    shared, output = network.heads[0], network.model.lm_head
    for call in range(4):
        with torch.no_grad():
            output.weight.add_(1e-3)
        weight = output.weight.clone()
        network(tokens, labels=tokens)
        assert torch.equal(shared.weight, weight) == (call % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    tokens = make_tokens(8, 16)
    network = cut_language_model(make_model(), 2, tokens)
    _, expected = gradients(network, tokens)
    network.zero_grad()
    with torch.autocast("cpu", dtype):
        output = network(tokens, labels=tokens)
    output.loss.backward()
    for name, parameter in network.named_parameters():
        error = (parameter.grad - expected[name]).norm()
        assert error < 0.05 * expected[name].norm() + 1e-6, name


def test_no_tensor_holds_the_logits_of_all_tokens():
    vocabulary, tokens = 32768, make_tokens(64, 16, 32768)
    network = cut_language_model(make_model(vocab_size=vocabulary), 3, tokens[:1])
    with autograd.profiler.profile(profile_memory=True, use_kineto=True) as profiled:
        network(tokens, labels=tokens).loss.backward()
    largest = max(event.nbytes() for event in profiled.kineto_results.events() if event.name() == "[memory]")
    assert 0 < largest < 60 << 20 < 4 * tokens.numel() * vocabulary


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_call_with_labels_keeps_no_keys_and_values(name):
    model, tokens = make_model(name), make_tokens()
    network = cut_language_model(model, 2, tokens)
    caches = []

    def watch(module, args, keywords):
        caches.append(any(isinstance(x, transformers.Cache) for x in (*args, *keywords.values())))

    model.get_submodule(network.at[0]).register_forward_pre_hook(watch, with_kwargs=True)
    network(tokens, labels=tokens)
    network.stage_logits(tokens)
    model(tokens)
    assert caches == [False, False, True]


class Other(nn.Module):
    """A module that is no language model."""


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (Other, {}, "model must be a causal language model of Hugging Face, not Other"),
        (make_model, {"stages": 0}, "stages must be from 1 to the model's number of blocks, 4, not 0"),
        (make_model, {"stages": 5}, "stages must be from 1 to the model's number of blocks, 4, not 5"),
        (make_model, {"readout": "none"}, "readout must be one of private, shared, not 'none'"),
        (make_model, {"readout_blocks": -1}, "readout_blocks must be at least 0, not -1"),
        (make_model, {"readout_refresh": 0}, "readout_refresh must be at least 1, not 0"),
        (lambda: make_model(num_attention_heads=32), {"readout_blocks": 1}, "readout_blocks must be 0 for a width of 32"),
        (
            lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GATED, head_dim=16)),
            {},
            "model must not cap its logits",
        ),
        (
            lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**GATED)),
            {},
            "model must not change the logits of its output layer",
        ),
    ],
)  # fmt: skip
def test_refusals(make, settings, message):
    with pytest.raises(ValueError, match=message):
        cut_language_model(make(), settings.pop("stages", 2), make_tokens(), **settings)


def test_class_weights_are_refused():
    network = cut_language_model(make_model(), 2, make_tokens())
    network.loss_options = StageLossOptions(class_weight=torch.ones(V))
    with pytest.raises(ValueError, match="class_weight must be None"):
        network(make_tokens(), labels=make_tokens())
