"""Memory for a model's normalised weights and their gradients, used again step after step.

The system zeroes fresh memory page by page on the first write, which for large tensors costs more
than the kernels do (benchmarks/NOTES.md), and large tensors are what the C library gives back to
the system. The outputs of one training step die before the next one needs the same sizes, so a
model keeps their blocks. A block is lent again only when no storage holds it any more, which its
memoryview's life tells: the storage owns the only reference to it. So whatever autograd, the user
or numpy still hold stays untouched.
"""

import mmap
import threading
import weakref

import torch

LEAST_BYTES = 1 << 17  # smaller tensors' memory stays in the process, and a block costs 2 µs more


class Blocks:
    """The blocks of one model; they live as long as it does. Copies and pickles are empty."""

    def __init__(self):
        self._by_size = {}
        self._lock = threading.Lock()

    def __reduce__(self):
        return Blocks, ()

    def empty_like(self, dense):
        """torch.empty_like(dense), for a non-overlapping and dense tensor."""
        size = dense.numel() * dense.element_size()
        if size < LEAST_BYTES or not dense.is_cpu:  # a GPU's allocator does this itself
            return torch.empty_like(dense)
        with self._lock:
            blocks = self._by_size.setdefault(size, [])
            block = next((block for block in blocks if block.is_free()), None)
            if block is None:
                block = _Block(size)
                blocks.append(block)
            memory = block.lend()
        # Not a view: this tensor has the storage and a version of its own.
        tensor = torch.frombuffer(memory, dtype=dense.dtype)
        return tensor.as_strided_(dense.shape, dense.stride())


class _Block:
    def __init__(self, size):
        if hasattr(mmap, "MAP_PRIVATE"):
            # A forked child gets its own copy.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._memory = mmap.mmap(-1, size, flags=flags)
        else:
            self._memory = mmap.mmap(-1, size)
        self._lent = None

    def is_free(self):
        return self._lent is None or self._lent() is None

    def lend(self):
        view = memoryview(self._memory)
        self._lent = weakref.ref(view)
        return view
