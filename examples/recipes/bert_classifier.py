"""Train a Hugging Face BERT classifier on sentences of different lengths with the Trainer of transformers."""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from sid_trainer import cut


class Sequences(Dataset):
    """Padded random sequences. The first token of each is one of three, and is its class."""

    def __init__(self, count: int, seed: int, length: int = 12):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 3, (count,), generator=generator)
        lengths = torch.randint(4, length + 1, (count, 1), generator=generator)
        self.mask = (torch.arange(length) < lengths).long()
        tokens = torch.randint(4, 30, (count, length), generator=generator)
        tokens[:, 0] = self.labels + 1
        self.tokens = tokens * self.mask  # 0 is padding

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[i], "attention_mask": self.mask[i], "labels": self.labels[i]}


def main(steps: int = 80) -> float:
    """Train on synthetic sequences and return the accuracy on new ones."""
    torch.manual_seed(0)
    train, test = Sequences(512, seed=0), Sequences(256, seed=1)
    config = BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, num_labels=3,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    example = {"input_ids": train.tokens[:2], "attention_mask": train.mask[:2]}
    layers = [f"bert.encoder.layer.{i}" for i in range(3)]
    network = cut(BertForSequenceClassification(config), layers, num_classes=3, example=example)  # heads use the mask

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=3e-3, logging_steps=20,
            remove_unused_columns=False,  # the network takes any keyword input
            save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        Trainer(network, arguments, train_dataset=train).train()

    network.eval()
    with torch.no_grad():
        logits = network(input_ids=test.tokens, attention_mask=test.mask)
    accuracy = (logits.argmax(1) == test.labels).float().mean().item()
    print(f"test accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
