"""Train a Hugging Face GPT-2 as a causal language model, save it, load it again and generate."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sid_trainer import StageLossOptions, cut_language_model

TEXT = "the quick brown fox jumps over the lazy dog. "
VOCABULARY = sorted(set(TEXT))


def main(steps: int = 60) -> float:
    """Train on the characters of one sentence and return the share of correct characters in its continuation."""
    torch.manual_seed(0)
    tokens = torch.tensor([VOCABULARY.index(character) for character in TEXT * 4])
    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_positions=64, n_embd=48, n_layer=4, n_head=3, bos_token_id=0, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)

    def batch() -> torch.Tensor:
        starts = torch.randint(0, len(tokens) - 32, (16, 1))
        return tokens[starts + torch.arange(32)]  # (B, T)

    # Three stages. The last reads by the model's own norm and lm_head, the others by a copy of lm_head's weight.
    network = cut_language_model(model, 3, batch(), readout="shared")
    network.loss_options = StageLossOptions(alpha=[1.0, 0.7, 0.7])
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for step in range(steps):
        input_ids = batch()
        optimizer.zero_grad()
        output = network(input_ids=input_ids, labels=input_ids)  # the target of a token is the label of the next one
        output.loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}  loss of each stage {[round(loss, 3) for loss in output.stage_loss.tolist()]}")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = GPT2LMHeadModel.from_pretrained(folder).eval()
    prompt = tokens[None, :12]
    generated = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)[0]
    print("".join(VOCABULARY[token] for token in generated))
    return (generated[12:] == tokens[12:36]).float().mean().item()


if __name__ == "__main__":
    main()
