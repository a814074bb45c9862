"""Test `cut` by names: models of timm, torchvision and transformers, and models written to be difficult."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.drop_in import train_steps
from sid_trainer import StageLossOptions, bp_step, cut
from sid_trainer.network import local_pass
from sid_trainer.network.channels import infer_channels, record_outputs

CLASSES, BATCH, STEPS = 5, 4, 20


def images(size=32, channels=3, count=BATCH):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def labels(count=BATCH):
    return torch.arange(count) % CLASSES


# ---------------------------------------------------------------- models of others: (model, inputs, names)


def timm(name, size, at, **settings):
    def make():
        module = pytest.importorskip("timm")
        return module.create_model(name, num_classes=CLASSES, **settings), images(size), at

    return make


def torchvision(build, size, at):
    def make():
        import torchvision.models as models

        return build(models), images(size), at

    return make


def transformers(config, model, at, inputs, **settings):
    def make():
        module = pytest.importorskip("transformers")
        return getattr(module, model)(getattr(module, config)(**settings)), inputs(), at

    return make


def tokens():
    ids = torch.randint(CLASSES, 40, (BATCH, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


SMALL_BERT = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES,
}  # fmt: skip
SMALL_GPT2 = {
    "vocab_size": 40, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SMALL_LLAMA = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
SMALL_VIT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8, "num_labels": CLASSES, "hidden_dropout_prob": 0.0,
}  # fmt: skip
STAGES_4 = [f"stages.{i}" for i in range(4)]
LAYERS_4 = [f"layer{i}" for i in range(1, 5)]


def small_maxvit(models):
    return models.MaxVit(
        (64, 64), stem_channels=24, partition_size=2, block_channels=[24, 48], block_layers=[1, 1], head_dim=8,
        stochastic_depth_prob=0.0, num_classes=CLASSES,
    )  # fmt: skip


MODELS = {
    "timm-resnet18": timm("resnet18", 32, LAYERS_4),
    "timm-resnet50": timm("resnet50", 32, LAYERS_4),
    "timm-convnext_atto": timm("convnext_atto", 64, STAGES_4),
    "timm-vit_tiny": timm("vit_tiny_patch16_224", 32, ["blocks.0", "blocks.2", "blocks.3"], img_size=32, patch_size=8, depth=4),
    "timm-deit_tiny": timm("deit_tiny_patch16_224", 32, ["blocks.0", "blocks.2", "blocks.3"], img_size=32, patch_size=8, depth=4),
    "timm-swin_tiny": timm("swin_tiny_patch4_window7_224", 56, ["layers.0", "layers.1", "layers.3"], img_size=56, depths=(1, 1, 1, 1), embed_dim=48, drop_path_rate=0.0),
    "timm-mobilenetv3_small": timm("mobilenetv3_small_100", 32, ["blocks.1", "blocks.3", "blocks.5"]),
    "timm-efficientnet_b0": timm("efficientnet_b0", 32, ["blocks.1", "blocks.3", "blocks.6"]),
    "timm-mixer_s16": timm("mixer_s16_224", 64, ["blocks.0", "blocks.1", "blocks.2"], img_size=64),
    "timm-regnety_002": timm("regnety_002", 32, ["s1", "s2", "s3", "s4"]),
    "timm-densenet121": timm("densenet121", 32, ["features.denseblock1", "features.transition2", "features.denseblock4"], block_config=(2, 2, 2, 2)),
    "timm-poolformer_s12": timm("poolformer_s12", 32, STAGES_4),
    "timm-maxvit_nano": timm("maxvit_nano_rw_256", 64, STAGES_4[:3], img_size=64, depths=(1, 1, 1, 1), embed_dim=(32, 32, 64, 64), drop_path_rate=0.0),
    "timm-efficientformerv2_s0": timm("efficientformerv2_s0", 64, STAGES_4, img_size=64, drop_path_rate=0.0),
    "timm-vgg11_bn": timm("vgg11_bn", 32, ["features.7", "features.14", "features.21", "features.28"]),
    "torchvision-resnet50": torchvision(lambda m: m.resnet50(num_classes=CLASSES), 32, LAYERS_4),
    "torchvision-convnext_tiny": torchvision(lambda m: m.convnext_tiny(num_classes=CLASSES, stochastic_depth_prob=0.0), 32, ["features.1", "features.3", "features.5"]),
    "torchvision-efficientnet_b0": torchvision(lambda m: m.efficientnet_b0(num_classes=CLASSES, stochastic_depth_prob=0.0), 32, ["features.2", "features.4", "features.8"]),
    "torchvision-swin_t": torchvision(lambda m: m.SwinTransformer([4, 4], 48, [1, 1, 1], [2, 4, 8], [7, 7], stochastic_depth_prob=0.0, num_classes=CLASSES), 56, ["features.1", "features.3", "features.5"]),
    "torchvision-vit_b_16": torchvision(lambda m: m.VisionTransformer(32, 8, 3, 2, 48, 96, num_classes=CLASSES), 32, [f"encoder.layers.encoder_layer_{i}" for i in range(3)]),
    "torchvision-mobilenet_v3_small": torchvision(lambda m: m.mobilenet_v3_small(num_classes=CLASSES), 32, ["features.3", "features.6", "features.12"]),
    "torchvision-maxvit_t": torchvision(small_maxvit, 64, ["blocks.0", "blocks.1"]),
    "transformers-bert": transformers("BertConfig", "BertForSequenceClassification", [f"bert.encoder.layer.{i}" for i in range(3)], tokens, **SMALL_BERT),
    "transformers-vit": transformers("ViTConfig", "ViTForImageClassification", None, images, **SMALL_VIT),
    "transformers-gpt2": transformers("GPT2Config", "GPT2LMHeadModel", ["transformer.h.0", "transformer.h.2"], tokens, **SMALL_GPT2),
    "transformers-llama": transformers("LlamaConfig", "LlamaForCausalLM", ["model.layers.0", "model.layers.2"], tokens, **SMALL_LLAMA),
}  # fmt: skip
LANGUAGE = ("transformers-gpt2", "transformers-llama")
HEAVY = (
    "timm-resnet18", "timm-mixer_s16", "timm-resnet50", "timm-poolformer_s12", "timm-vgg11_bn", "timm-efficientnet_b0", "torchvision-resnet50",
    "torchvision-convnext_tiny", "torchvision-efficientnet_b0", "timm-maxvit_nano", "timm-swin_tiny", "timm-mobilenetv3_small",
    "timm-deit_tiny", "timm-regnety_002",
)  # fmt: skip


def cut_model(name):
    """Return a network of the model `name`, its inputs, and targets."""
    torch.manual_seed(0)
    model, inputs, at = MODELS[name]()
    at = at or [n for n, module in model.named_modules() if type(module).__name__ == "ViTLayer"]
    if name not in LANGUAGE:
        return cut(model, at, CLASSES, inputs), inputs, labels()
    options = {"per_position": True, "shift": True, "prior_input": False, "head_depth": 0}
    targets = inputs["input_ids"].where(inputs["attention_mask"] > 0, -100)
    return cut(model, at, 40, inputs, **options), inputs, targets


def assert_nothing_crosses(network, inputs, targets, monkeypatch):
    """Check that a change of one stage's loss changes that stage's gradients and those of no other."""
    network.train()  # no model here draws random numbers
    original = local_pass.stage_loss

    def gradients(changed):
        stage = 0

        def stage_loss(*args):
            nonlocal stage
            loss, belief, dlogits = original(*args)
            stage += 1
            return loss, belief, 3 * dlogits if stage - 1 == changed else dlogits

        monkeypatch.setattr(local_pass, "stage_loss", stage_loss)
        network.zero_grad()
        network(inputs, targets).loss.backward()
        stages = [network.parameters_of_stage(i) for i in range(network.depth)]
        return [[None if p.grad is None else p.grad.clone() for p in stage] for stage in stages]

    plain = gradients(None)
    assert all(any(g is not None and g.abs().sum() > 0 for g in stage) for stage in plain)
    for changed in range(network.depth):
        for i, (before, after) in enumerate(zip(plain, gradients(changed), strict=True)):
            same = [a is b is None or torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            assert all(same) if i != changed else not all(same)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in HEAVY else ()) for name in MODELS]
)
def test_a_model_trains_by_its_names(name, monkeypatch):
    network, inputs, targets = cut_model(name)
    keys = {key: value.shape for key, value in network.model.state_dict().items()}
    fresh = MODELS[name]()[0].state_dict()
    assert keys == {key: value.shape for key, value in fresh.items()}
    assert_nothing_crosses(network, inputs, targets, monkeypatch)
    first, last = train_steps(network, inputs, targets, STEPS)
    assert last.sum() < first.sum(), (first, last)
    assert type(network.model).__name__ == type(MODELS[name]()[0]).__name__
    assert list(network.model.state_dict()) == list(keys)
    assert not any(module._forward_hooks for module in network.model.modules())


# ---------------------------------------------------------------- models that are difficult


class UNet(nn.Module):
    def __init__(self, width=6):
        super().__init__()

        def block(before, after):
            return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())

        self.down1, self.down2, self.bottom = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up2, self.up1 = block(6 * width, 2 * width), block(3 * width, width)
        self.classifier = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.up2(torch.cat((F.interpolate(self.bottom(F.max_pool2d(b, 2)), scale_factor=2), b), 1))
        return self.classifier(self.up1(torch.cat((F.interpolate(c, scale_factor=2), a), 1)))


class TwoInputs(nn.Module):
    """A model with positional and keyword inputs, a tuple and a dict between modules, and a mask that blocks read."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, state, mask):
            features = self.linear(state["features"]) * mask
            return {"features": features, "count": state["count"] + 1}

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, inputs, other, *, mask):
        state = {"features": self.embed(inputs) + other, "count": 0}
        for block in self.blocks:
            state = block(state, mask)
        assert state["count"] == 3
        return state["features"]


def test_a_unet_learns_pixels_with_its_skips_and_its_own_classifier(monkeypatch):
    torch.manual_seed(0)
    model, inputs = UNet(), images(16)
    targets = ((inputs[:, 0] > 0).long() + (inputs[:, 1] > 0)).masked_fill(inputs[:, 2] > 1, -100)
    network = cut(model, ["down1", "down2", "bottom", "up2"], CLASSES, inputs, per_position=True, own_classifier=True)
    assert network.depth == 5 and not network.untrained
    assert_nothing_crosses(network, inputs, targets, monkeypatch)
    network.train()
    first, last = train_steps(network, inputs, targets, 60, lr=1e-2)
    assert (last < 0.8 * first).all()
    soft = F.one_hot(targets.clamp(min=0), CLASSES).float()
    assert network(inputs, soft).loss.isfinite() and network.eval()({"x": inputs}).shape == (BATCH, CLASSES, 16, 16)
    output = network(inputs, targets)
    assert output.logits.shape == network.eval()(inputs).shape == (BATCH, CLASSES, 16, 16) == model(inputs).shape


def test_two_inputs_dicts_and_masks():
    torch.manual_seed(0)
    network = cut(
        TwoInputs(), [f"blocks.{i}" for i in range(3)], CLASSES,
        {"inputs": torch.randn(2, 4), "other": torch.randn(2, 8), "mask": torch.ones(2, 1)},
    )  # fmt: skip
    inputs, other, mask = torch.randn(BATCH, 4), torch.randn(BATCH, 8), torch.ones(BATCH, 1)
    losses = []
    for given in ((inputs, other), {"inputs": inputs, "other": other}):
        losses.append(network(given, labels(), mask=mask).stage_loss)
    assert torch.equal(losses[0], losses[1])
    assert [len(names) for names in network.stage_parameters] == [4, 2, 2]


def test_padding_does_not_count():
    network, inputs, _ = cut_model("transformers-bert")
    other = {"input_ids": inputs["input_ids"].clone(), "attention_mask": inputs["attention_mask"]}
    other["input_ids"][0, 7:] = 3
    assert network.mask == "attention_mask"
    torch.testing.assert_close(network.eval()(inputs), network(**other))


def test_a_mask_is_for_tokens():
    """Check that vectors after a mean need no mask, and that another number of tokens has another mask, or none."""

    class Pairs(nn.Module):
        def __init__(self, joined):
            super().__init__()
            self.embed, self.pairs, self.pool = nn.Embedding(40, 8), nn.Linear(16, 8), nn.Linear(8, 8)
            self.joined = joined

        def forward(self, input_ids, attention_mask):
            x = self.embed(input_ids)
            return self.pool((self.pairs(x.reshape(len(x), -1, 16)) if self.joined else x).mean(1))

    first, last = train_steps(cut(Pairs(False), ["embed", "pool"], CLASSES, tokens()), tokens(), labels(), 5, lr=1e-2)
    assert (last < first).all()
    with pytest.raises(ValueError, match=r"mask must be \(B, T\) for tokens \(B, T, D\), not \(4, 12\) for features"):
        cut(Pairs(True), ["pairs", "pool"], CLASSES, tokens())
    assert cut(Pairs(True), ["pairs", "pool"], CLASSES, tokens(), mask="").mask is None


def test_the_own_classifier_is_the_last_stage():
    import torchvision.models

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=CLASSES)
    network = cut(model, LAYERS_4[:3], CLASSES, images(), own_classifier=True)
    assert network.depth == 4 and len(network.heads) == 3 and not network.untrained
    assert "fc.weight" in network.stage_parameters[3] and "layer4.0.conv1.weight" in network.stage_parameters[3]
    network.eval()
    torch.testing.assert_close(network(images()), model(images()))
    with pytest.raises(ValueError, match="num_classes must be 5, as in the model's own classifier, not 7"):
        cut(model, LAYERS_4[:3], 7, images(), own_classifier=True)


def test_backpropagation_trains_through_the_cuts():
    network, inputs, targets = cut_model("timm-vit_tiny")
    bp_step(network, inputs, targets)
    assert network.model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_own_heads_as_a_list_and_as_a_function():
    class Head(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.linear = nn.Linear(width, CLASSES)

        def forward(self, features, prior):
            return self.linear(features.mean((2, 3)))

    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3))
    for heads in ([Head(4), Head(6)], nn.ModuleList([Head(4), Head(6)]), lambda i, features: Head(features.shape[1])):
        network = cut(trunk, ["0", "1"], CLASSES, images(8), heads=heads)
        first, last = train_steps(network, images(8), labels(), 10, lr=1e-2)
        assert (last < first).all()


def test_a_cut_leaves_statistics_modes_and_frozen_parameters_as_they_are():
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 3))
    trunk[1].eval()
    trunk[0].weight.requires_grad_(False)
    before = copy.deepcopy(trunk.state_dict())
    network = cut(trunk, ["2", "3"], CLASSES, images(8))
    assert all(torch.equal(value, before[key]) for key, value in trunk.state_dict().items())
    assert [module.training for module in trunk] == [True, False, True, True]
    assert not trunk[0].weight.requires_grad and "0.weight" in network.stage_parameters[0]
    network(images(8), labels()).loss.backward()
    assert trunk[0].weight.grad is None and trunk[0].bias.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_heads_take_the_dtype_of_the_trunk(dtype):
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).to(dtype)
    network = cut(trunk, ["1", "2"], CLASSES, images(8).to(dtype))
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    first, last = train_steps(network, images(8).to(dtype), labels(), 10, lr=1e-2)
    assert last.sum() < first.sum()


def test_class_weights_and_smoothing_of_a_cut_network():
    trunk = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    network = cut(trunk, ["1", "2"], CLASSES, torch.randn(2, 6))
    network.loss_options = StageLossOptions([1.0, 1.0], label_smoothing=0.1)
    inputs, targets = torch.randn(BATCH, 6), labels()
    output = network(inputs, targets)
    expected = F.cross_entropy(network(inputs), targets, label_smoothing=0.1)
    torch.testing.assert_close(output.stage_loss[-1], expected.detach())


def test_a_cut_without_gradients_and_a_network_in_a_network():
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.block = inner, nn.Linear(8, 8)

        def forward(self, x):
            self.inner(x, torch.zeros(len(x), dtype=torch.long))
            return self.block(x)

    with torch.no_grad():
        inner = cut(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), ["0", "1"], CLASSES, torch.randn(2, 8))
    assert [len(names) for names in inner.stage_parameters] == [2, 2]
    network = cut(Outer(inner), ["block"], CLASSES, torch.randn(2, 8))
    assert network(torch.randn(2, 8), torch.tensor([0, 1])).loss.isfinite()


# ---------------------------------------------------------------- where the channels are


class Permuted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).permute(0, 2, 3, 1)


class Residual(Permuted):
    def forward(self, x):
        return x + self.inner(x)


LAYOUTS = {
    "images": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), images(9), "first"),
    "square images": (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), images(8), "first"),
    "square images, permuted": (Permuted(nn.Conv2d(3, 8, 3, padding=1)), images(8), None),
    "square images, twice permuted": (Permuted(Permuted(nn.Linear(8, 8))), images(8, 8), None),
    "square images, a residual block": (Residual(nn.Conv2d(8, 8, 3, padding=1)), images(8, 8), None),
    "square images, dropout and identity": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.5), nn.Identity()),
        images(8),
        "first",
    ),
    "images, channels last": (nn.Sequential(nn.Linear(3, 8), nn.ReLU()), images(9).movedim(1, -1), "last"),
    "tokens": (nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8)), torch.randn(2, 7, 3), "last"),
    "series": (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), torch.randn(2, 3, 7), "first"),
    "volumes": (nn.Sequential(nn.Conv3d(3, 8, 3)), torch.randn(2, 3, 5, 6, 7), "first"),
    "nothing tells": (nn.ReLU(), torch.randn(2, 7, 3), None),
    "layers disagree": (nn.Sequential(nn.Conv1d(6, 6, 1), nn.Linear(7, 7)), torch.randn(2, 6, 7), None),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_channels_are_inferred_where_they_are_certain(name):
    model, inputs, channels = LAYOUTS[name]
    with record_outputs(model) as outputs:
        features = model(inputs)
    assert infer_channels(outputs, features) == channels


@pytest.mark.parametrize("name, pooled", [("series", 8), ("volumes", 8), ("images, channels last", 8), ("tokens", 8)])
def test_heads_average_over_the_positions(name, pooled):
    model, inputs, channels = LAYOUTS[name]
    network = cut(nn.Sequential(model), ["0"], CLASSES, inputs, grid=1)
    features = model.eval()(inputs)
    own = network.eval().heads[0].pooling(features)
    positions = tuple(range(2, features.dim())) if channels == "first" else tuple(range(1, features.dim() - 1))
    expected = features.mean(positions)
    if name == "tokens":
        expected = F.layer_norm(features, (8,)).mean(1)
    torch.testing.assert_close(own, expected)


def test_a_layout_that_is_not_certain_is_asked_for():
    trunk = nn.Sequential(nn.ReLU(), nn.Tanh())
    for at in (["0", "1"], [1]):
        with pytest.raises(ValueError, match=r"channels must be 'first' or 'last' for the features \(2, 7, 3\)"):
            cut(trunk, at, CLASSES, torch.randn(2, 7, 3))
    for channels, width in (("first", 7 * 3), ("last", 3)):  # 7 channels in 3 cells; the mean of 7 tokens
        head = cut(trunk, ["1"], CLASSES, torch.randn(2, 7, 3), channels=channels).heads[0]
        assert head.hidden.in_features == CLASSES + width
