"""One model in every form in which it, or a part of it, is compiled or wrapped."""

from __future__ import annotations

import torch
from torch import nn
from toys import data_parallel

NAMES = ["block.0.weight", "block.0.bias", "block.1.weight", "block.1.bias", "head.weight", "head.bias"]


class TwoParts(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.block = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.block(x).relu())


def compiled(module):
    return torch.compile(module, backend="eager")


def with_compiled_block(model):
    model.block = compiled(model.block)
    return model


def with_compiled_parts(model):
    model.block[0] = compiled(model.block[0])
    return with_compiled_block(model)


def compiled_in_place(model):
    model.block.compile(backend="eager")
    return model


FORMS = {
    "plain": lambda model: model,
    "compiled": compiled,
    "compiled block": with_compiled_block,
    "compiled parts": with_compiled_parts,
    "compiled in place": compiled_in_place,
    "compiled with a compiled block": lambda model: compiled(with_compiled_block(model)),
    "DataParallel of a compiled block": lambda model: data_parallel(with_compiled_block(model)),
}
