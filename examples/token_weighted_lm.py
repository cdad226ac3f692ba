"""A small language model that learns to write like Python's own reference, character by character.

    python examples/token_weighted_lm.py      # two minutes on a CPU; --quick for a shorter run

Sentences have different lengths, so a mean of batch means is not the mean over characters. `loss_weight=count_tokens` weights
each batch by its characters. The script first shows that a step then equals the step of a single big batch, and then trains
with it.
"""

import argparse
import copy
import math
import re
from pathlib import Path
from pydoc_data.topics import topics

import torch
from ignite.metrics import Loss
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from camshaft import Events, create_evaluator, create_trainer, seed_everything
from camshaft.handlers import Evaluation, TensorBoard

END, PAD = 0, -100  # the end of a sentence; padding


def sentences():
    """The sentences of Python's language reference, which is part of every Python, as tensors of character codes."""
    text = re.sub(r"\s+", " ", " ".join(topics.values()))
    found = dict.fromkeys(re.findall(r"[A-Z][^.!?]{10,150}[.!?](?= )", text))
    return [torch.tensor([END, *sentence.encode(), END]) for sentence in found if sentence.isascii()]


def collate(batch):
    """A batch of padded sentences: each character is an input, and the next one its target."""
    inputs = pad_sequence([sentence[:-1] for sentence in batch], batch_first=True, padding_value=END)
    return inputs, pad_sequence([sentence[1:] for sentence in batch], batch_first=True, padding_value=PAD)


def count_tokens(batch):
    return (batch[1] != PAD).sum()


def loss_fn(logits, targets):
    """The mean over the characters of a batch, without padding."""
    return cross_entropy(logits.transpose(1, 2), targets, ignore_index=PAD)


class Writer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding, self.head = nn.Embedding(128, width), nn.Linear(width, 128)
        self.memory = nn.GRU(width, width, batch_first=True)

    def forward(self, characters):
        return self.head(self.memory(self.embedding(characters))[0])

    @torch.inference_mode()
    def write(self, length=100):
        """Generates a sentence, one character at a time."""
        text, memory, character = b"", None, torch.tensor([[END]])
        while len(text) < length:
            hidden, memory = self.memory(self.embedding(character), memory)
            character = torch.multinomial((self.head(hidden[0]) / 0.7).softmax(1), 1)
            if character.item() == END:
                break
            text += bytes([character.item()])
        return text.decode()


def distance_from_the_big_batch(texts, loss_weight):
    """The largest difference between a step over four batches and a step over all of their sentences at once."""
    model = Writer(16).double()
    twin = copy.deepcopy(model)
    by_length = sorted(texts[:32], key=len)  # so that the lengths of the four batches differ as much as possible
    data = [collate(by_length[start : start + 8]) for start in range(0, 32, 8)]
    for network, batches in ((model, data), (twin, [collate(by_length)])):
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        create_trainer(network, optimizer, loss_fn, accumulation_steps=len(batches), loss_weight=loss_weight).run(batches)
    return max((one - other).abs().max().item() for one, other in zip(model.parameters(), twin.parameters(), strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/token_weighted_lm"))
    parser.add_argument("--quick", action="store_true", help="few sentences, a small network and three epochs")
    args = parser.parse_args()
    seed_everything(0)
    torch.set_num_threads(1)

    texts = sentences()
    lengths = sorted(map(len, texts))
    print(f"{len(texts)} sentences of {lengths[0]} to {lengths[-1]} characters")
    for name, loss_weight in (("each batch the same", "batch"), ("weighted by characters", count_tokens)):
        print(f"{name:24} off the big batch by {distance_from_the_big_batch(texts, loss_weight):.0e}")

    texts = [texts[number] for number in torch.randperm(len(texts))]
    held_out, texts = texts[:200], texts[200:500] if args.quick else texts[200:]
    model = Writer(32 if args.quick else 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    trainer = create_trainer(model, optimizer, loss_fn, accumulation_steps=4, loss_weight=count_tokens, clip_grad_norm=1.0)
    per_character = Loss(loss_fn, batch_size=lambda targets: (targets != PAD).sum().item())
    evaluator = create_evaluator(model, metrics={"loss": per_character})
    Evaluation(evaluator, DataLoader(held_out, 50, collate_fn=collate)).attach(trainer)
    TensorBoard(args.out).attach(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def report(engine):
        bits = engine.state.metrics["val/loss"] / math.log(2)
        print(f"epoch {engine.state.epoch:2}  {bits:.2f} bits a character  {model.write()}")

    trainer.run(DataLoader(texts, 8, shuffle=True, collate_fn=collate), max_epochs=3 if args.quick else 15)
    print(f"curves: tensorboard --logdir {args.out.parent}")


if __name__ == "__main__":
    main()
