"""A CUDA graph's behaviour on the CPU: operations are recorded with the memory that they use, and run by a replay.

What a graph knows of a device's random state isn't on the tape: it draws from the generator as the operations do.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

WAITING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero")
"""Operations whose result the host looks at."""


class Tape(TorchDispatchMode):
    """Everything that is done inside the block."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.before = {}
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        for tensor in tensors_of((args, kwargs)):
            place = tensor.untyped_storage()
            if place.data_ptr() not in self.made and place.data_ptr() not in self.before:
                self.before[place.data_ptr()] = place, place.clone()
        result = function(*args, **kwargs)
        fresh = [out for out, kind in outputs(function, result) if kind is None]
        for tensor in tensors_of(fresh):
            self.made[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        self.operations.append((torch.is_grad_enabled(), function, *tree_map(alias, (args, kwargs, fresh))))
        return result

    def undo(self):
        """Leaves memory as if nothing had run; what has been made holds rubbish."""
        for place, content in self.before.values():
            place.copy_(content)
        for place in self.made.values():
            place.fill_(0xFF)  # NaN, in every floating type

    def replay(self):
        """Runs it all again, on the same memory."""
        with torch._C._AutoDispatchBelowAutograd():
            for with_grad, function, args, kwargs, fresh in self.operations:
                with torch.set_grad_enabled(with_grad):  # some operations leave more for a backward pass
                    again = [out for out, kind in outputs(function, function(*args, **kwargs)) if kind is None]
                for kept, new in zip(tensors_of(fresh), tensors_of(again), strict=True):
                    kept.copy_(new)


class TapeRecorder:
    """In the place of ``CudaCapturer``."""

    made = 0
    replays = 0

    def __init__(self, device):
        self.device = device

    def __call__(self, work):
        generator = torch.get_rng_state()  # a device's own isn't drawn from by a recording
        tape = Tape()
        with tape:
            results = work()
        tape.undo()
        torch.set_rng_state(generator)
        TapeRecorder.made += 1

        def replay():
            TapeRecorder.replays += 1
            tape.replay()

        return replay, results


def alias(value):
    """The same memory under a name that nobody else has, whatever becomes of the tensor."""
    return value.detach() if isinstance(value, torch.Tensor) and value.layout is torch.strided else value


def tensors_of(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def outputs(function, result):
    """Each output with what its schema says of its memory: ``None`` where it has memory of its own."""
    returns = function._schema.returns
    results = (result,) if len(returns) == 1 else (result or ())
    return [(out, kind.alias_info) for out, kind in zip(results, returns, strict=True)]
