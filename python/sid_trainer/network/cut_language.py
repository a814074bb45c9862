"""A causal language model of Hugging Face, cut into stages that each read the next token by a readout.

No tensor (tokens, V) is made in training: a stage's loss comes from `fused_belief_head`, whose prior is the readout of
the stage before.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sid_kernels import PriorHead

from .cut import check_shared, evaluating, inspect
from .cut_network import CutNetwork, Visit, as_arguments
from .language import READOUTS, DecoderBlock, Readout, SharedReadout, initialize
from .local_pass import LocalOutput, LocalPass, reshard, shift_labels, warn_of_input_gradients

Head = tuple[Tensor, Tensor, Tensor | None]  # hidden (B * T, D), weight (V, D) and bias (V,) of a readout


class CutLanguageModel(CutNetwork):
    """A causal language model whose stages learn from their own losses; `cut_language_model` makes it.

    A call with `labels` (B, T), as in Hugging Face, trains every stage on the next tokens and returns a `LocalOutput`
    without logits, (0, V). Without labels it returns the model's own logits (B, T, V). The model itself generates, and
    is saved, as ever.
    """

    def __init__(self, model: nn.Module, at: Iterable[str], heads: Iterable[nn.Module], output: nn.Linear):
        super().__init__(model, [*at], heads, output.out_features, per_position=True, shift=True)
        self.output_layer = (output,)  # a tuple: the model owns the layer

    def readout(self, i: int, features: Tensor) -> Head:
        """Return what stage i reads of features (B, T, D): hidden vectors, weight and bias."""
        if i < len(self.heads):
            readout = self.heads[i]
            assert isinstance(readout, (Readout, SharedReadout))  # for type checkers
            return readout(features, None), readout.weight, None
        output = self.output_layer[0]
        return features.flatten(0, 1), output.weight, output.bias

    def run(self, inputs: Any, keywords: Mapping[str, Any], visit: Visit) -> Any:
        """Run the model as `CutNetwork` does, without a cache, which would hold the keys and values of all stages."""
        cache = {"use_cache": False} if getattr(self.model.config, "use_cache", False) else {}
        return super().run(inputs, {**cache, **keywords}, visit)

    def stage_logits(self, inputs: Any = None, **keywords: Any) -> list[Tensor]:
        """Return the logits (B, T, V) of every stage, first to last."""
        inputs, keywords = as_arguments(inputs, keywords)
        logits: list[Tensor] = []

        def visit(i: int, features: Tensor) -> bool:
            logits.append(F.linear(*self.readout(i, features)).unflatten(0, features.shape[:2]))
            return False

        self.run(inputs, keywords, visit)
        return logits

    def forward(
        self, inputs: Any = None, targets: Tensor | None = None, *, labels: Tensor | None = None, **keywords: Any
    ) -> Tensor | LocalOutput:
        """Return the model's logits (B, T, V), or with labels (B, T), -100 for none, a `LocalOutput`."""
        labels = targets if labels is None else labels
        inputs, keywords = as_arguments(inputs, keywords)
        if labels is None:
            return self.model(*(() if inputs is None else (inputs,)), **keywords).logits
        if self.loss_options.class_weight is not None:
            raise ValueError("class_weight must be None for a language model cut into stages")
        self.check_parameters()
        warn_of_input_gradients((inputs, keywords))
        reshard(self)
        next_tokens = shift_labels(labels, self.loss_options.ignore_index).flatten()
        prior: PriorHead | None = None

        def visit(i: int, features: Tensor) -> bool:
            nonlocal prior
            hidden, weight, bias = head = self.readout(i, features)
            local.learn_readout(head, prior, self.parameters_of_stage(i))
            prior = PriorHead(hidden.detach(), weight.detach(), None if bias is None else bias.detach())
            return True

        with LocalPass(next_tokens, self.loss_options, self.depth) as local:
            self.run(inputs, keywords, visit)
            assert prior is not None
            return local.output(prior.hidden.new_empty(0, self.num_classes))


def cut_language_model(
    model: Any, stages: int, example: Any, *, readout: str = "shared", readout_blocks: int = 0,
    readout_refresh: int = 1,
) -> CutLanguageModel:  # fmt: skip
    """Cut a causal language model of Hugging Face into stages of about equal numbers of blocks.

    The last stage reads by the model's own norm and output layer, the others by a norm and a readout of their own. The
    model is not copied. If its output layer is tied to its embedding, it gets a weight of its own, because no parameter
    may learn in two stages, and `model.config.tie_word_embeddings` becomes False, so that it is saved with both.

    Args:
        model: A model such as `GPT2LMHeadModel` or `LlamaForCausalLM`, with random or pretrained weights.
        stages: Number of stages K, at most that of the model's blocks.
        example: Inputs for the model: tokens (B, T), or a dict of keyword inputs.
        readout: "shared": all stages except the last read by a copy of the output layer's weight, which is made every
            `readout_refresh` calls with labels. "private": each has a weight (V, D) of its own.
        readout_blocks: Number of blocks of its own through which each stage except the last reads.

    Raises ValueError for arguments that are not allowed, and for models whose blocks, norm or output layer are not
    found or whose logits are not those of the output layer.
    """
    if readout not in READOUTS:
        raise ValueError(f"readout must be one of {', '.join(READOUTS)}, not {readout!r}")
    for name, number, least in (("readout_blocks", readout_blocks, 0), ("readout_refresh", readout_refresh, 1)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, not {number}")
    blocks, norm = find_blocks(model, example)
    if not 1 <= stages <= len(blocks):
        raise ValueError(f"stages must be from 1 to the model's number of blocks, {len(blocks)}, not {stages}")
    output = untied_output(model)
    width, heads = output.in_features, model.config.num_attention_heads
    if readout_blocks and width % (2 * heads):
        raise ValueError(f"readout_blocks must be 0 for a width of {width} that is no multiple of {2 * heads}")
    at = [blocks[round(len(blocks) * i / stages) - 1] for i in range(1, stages)]
    context = model.config.max_position_embeddings
    readouts: list[nn.Module] = []
    for _ in at:
        own = [DecoderBlock(width, heads, context) for _ in range(readout_blocks)]
        if readout == "shared":
            readouts.append(SharedReadout(output, own, readout_refresh))
        else:
            readouts.append(Readout(width, output.out_features, own))
    network = CutLanguageModel(model, [*at, norm], readouts, output)
    initialize(network.heads, len(blocks))
    network.heads.to(output.weight.device, output.weight.dtype)
    inspect(network, example)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    network.stage_parameters[-1] += [names[id(parameter)] for parameter in output.parameters()]
    check_shared(network)
    check_output(network, example)
    return network


def find_blocks(model: Any, example: Any) -> tuple[list[str], str]:
    """Return the names of the model's blocks, and of the norm after them. Raises ValueError if they are not found."""
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"model must be a causal language model of Hugging Face, not {type(model).__name__}")
    number = getattr(model.config, "num_hidden_layers", None)
    lists = [name for name, x in model.named_modules() if isinstance(x, nn.ModuleList) and len(x) == number]
    if not lists:
        raise ValueError(f"model must have its {number} blocks in a ModuleList, unlike this {type(model).__name__}")
    blocks = [f"{lists[0]}.{i}" for i in range(len(model.get_submodule(lists[0])))]
    parent, ran = lists[0].rpartition(".")[0], []
    beside = {f"{parent}.{name}": module for name, module in model.get_submodule(parent).named_children()}
    watched = beside | {blocks[-1]: model.get_submodule(blocks[-1])}
    handles = [module.register_forward_hook(lambda *_, n=name: ran.append(n)) for name, module in watched.items()]
    inputs, keywords = as_arguments(example, {})
    try:
        with evaluating(model), torch.no_grad():
            model(*(() if inputs is None else (inputs,)), **keywords)
    finally:
        for handle in handles:
            handle.remove()
    if not ran or ran[-1] == blocks[-1]:
        raise ValueError(f"model must have a norm after its blocks, unlike this {type(model).__name__}")
    return blocks, ran[-1]


def untied_output(model: Any) -> nn.Linear:
    """Return the model's output layer, with a weight of its own. Raises ValueError if it does not make the logits."""
    if getattr(model.config, "final_logit_softcapping", None):
        raise ValueError("model must not cap its logits: set final_logit_softcapping of its config to None")
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        raise ValueError(f"model must have a linear output layer, not {type(output).__name__}")
    embedding = model.get_input_embeddings()
    if embedding is not None and output.weight is embedding.weight:
        output.weight = nn.Parameter(output.weight.detach().clone(), output.weight.requires_grad)
        model.config.tie_word_embeddings = False
    return output


def check_output(network: CutLanguageModel, example: Any) -> None:
    """Raise ValueError unless the model's logits for the example are those of its output layer after the last cut."""
    inputs, keywords = as_arguments(example, {})
    with evaluating(network), torch.no_grad():
        expected = network(inputs, **keywords)
        logits = network.stage_logits(inputs, **keywords)[-1]
    if logits.shape != expected.shape or not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
        raise ValueError("model must not change the logits of its output layer, as a scale does")
