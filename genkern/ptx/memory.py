"""Which memory a kernel may touch, learnt from the tensors whose addresses its op asked for."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genkern.ptx.execute import Buffer

# What these give, kernels may write.
_ALLOCATIONS = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::zeros",
    "aten::zeros_like",
    "aten::new_zeros",
}


class WatchedMemory(TorchDispatchMode):
    """Inside the `with`, `buffers()` are the elements of every tensor whose data_ptr() was called:
    writable where torch.empty and the like gave them inside too, or where an op announced its
    write by increment_version, else write-protected."""

    def __init__(self):
        super().__init__()
        self._asked_for = []  # held, so that no address is used twice
        self._allocated = []
        self._writable = set()  # addresses of storages
        self._buffers = {}

    def __enter__(self):
        data_ptr = torch.Tensor.data_ptr
        self._frombuffer, self._increment = torch.frombuffer, torch.autograd.graph.increment_version

        def watching(tensor):
            self.add(tensor)
            return data_ptr(tensor)

        def lent(*args, **kwargs):  # the memory of genkern.spectral_norm's outputs
            tensor = self._frombuffer(*args, **kwargs)
            self._allow_writes(tensor)
            return tensor

        def announced(tensors):
            for tensor in (tensors,) if isinstance(tensors, torch.Tensor) else tensors:
                self._allow_writes(tensor)
            self._increment(tensors)

        torch.Tensor.data_ptr = watching
        torch.frombuffer, torch.autograd.graph.increment_version = lent, announced
        return super().__enter__()

    def __exit__(self, *error):
        del torch.Tensor.data_ptr  # the base class's own is seen again
        torch.frombuffer = self._frombuffer
        torch.autograd.graph.increment_version = self._increment
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.name().split(".")[0] in _ALLOCATIONS:
            self._allow_writes(result)
        return result

    def _allow_writes(self, tensor):
        storage = tensor.untyped_storage()
        self._allocated.append(storage)
        self._writable.add(storage.data_ptr())

    def add(self, tensor):
        if tensor.numel() == 0:
            return
        storage = tensor.untyped_storage()
        start = storage.data_ptr() + tensor.storage_offset() * tensor.element_size()
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        key = start, (last + 1) * tensor.element_size()
        if key not in self._buffers:
            self._asked_for.append(tensor.detach())
            name = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            self._buffers[key] = storage.data_ptr(), name

    def buffers(self):
        from genkern.ptx import Buffer

        return [
            Buffer(start, nbytes, storage in self._writable, name)
            for (start, nbytes), (storage, name) in self._buffers.items()
        ]
