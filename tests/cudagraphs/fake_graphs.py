"""A stand-in for CUDA graphs on the CPU: records operations with the memory that they use, and replays them.

Random state is not recorded: operations draw from the generator again when they are replayed.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HOST_READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero")
"""Operations whose result is read by the host."""


class OperationRecorder(TorchDispatchMode):
    """Records every operation inside the block."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.before = {}
        self.allocated = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in HOST_READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        for tensor in tensors_of((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.allocated and storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()
        result = function(*args, **kwargs)
        fresh = [out for out, kind in outputs(function, result) if kind is None]
        for tensor in tensors_of(fresh):
            self.allocated[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        self.operations.append((torch.is_grad_enabled(), function, *tree_map(alias, (args, kwargs, fresh))))
        return result

    def restore_memory(self):
        """Restores the memory from before the block, and fills memory allocated inside it with garbage."""
        for storage, content in self.before.values():
            storage.copy_(content)
        for storage in self.allocated.values():
            storage.fill_(0xFF)  # NaN, in every floating type

    def replay(self):
        """Runs the operations again on the same memory."""
        with torch._C._AutoDispatchBelowAutograd():
            for with_grad, function, args, kwargs, fresh in self.operations:
                with torch.set_grad_enabled(with_grad):  # some operations save more for a backward pass
                    again = [out for out, kind in outputs(function, function(*args, **kwargs)) if kind is None]
                for kept, new in zip(tensors_of(fresh), tensors_of(again), strict=True):
                    kept.copy_(new)


class FakeCapturer:
    """Replaces ``CudaCapturer`` in tests."""

    captures = 0
    replays = 0

    def __init__(self, device):
        self.device = device

    def __call__(self, work):
        generator = torch.get_rng_state()  # capturing does not draw from the generator of a device
        recorder = OperationRecorder()
        with recorder:
            results = work()
        recorder.restore_memory()
        torch.set_rng_state(generator)
        FakeCapturer.captures += 1

        def replay():
            FakeCapturer.replays += 1
            recorder.replay()

        return replay, results


def alias(value):
    """A view of the same memory, which stays valid if the tensor itself is changed."""
    return value.detach() if isinstance(value, torch.Tensor) and value.layout is torch.strided else value


def tensors_of(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def outputs(function, result):
    """Each output with the alias information of its schema, which is ``None`` for newly allocated memory."""
    returns = function._schema.returns
    results = (result,) if len(returns) == 1 else (result or ())
    return [(out, kind.alias_info) for out, kind in zip(results, returns, strict=True)]
