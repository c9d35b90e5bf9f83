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
    writable where torch.empty and the like gave them inside too, else write-protected."""

    def __init__(self):
        super().__init__()
        self._asked_for = []  # held, so that no address is used twice
        self._allocated = []
        self._writable = set()  # addresses of storages
        self._buffers = {}

    def __enter__(self):
        data_ptr = torch.Tensor.data_ptr

        def watching(tensor):
            self.add(tensor)
            return data_ptr(tensor)

        torch.Tensor.data_ptr = watching
        return super().__enter__()

    def __exit__(self, *error):
        del torch.Tensor.data_ptr  # the base class's own is seen again
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.name().split(".")[0] in _ALLOCATIONS:
            storage = result.untyped_storage()
            self._allocated.append(storage)
            self._writable.add(storage.data_ptr())
        return result

    def add(self, tensor):
        if tensor.numel() == 0:
            return
        storage = tensor.untyped_storage()
        start = storage.data_ptr() + tensor.storage_offset() * tensor.element_size()
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        nbytes = (last + 1) * tensor.element_size()
        key = start, nbytes
        if key not in self._buffers:
            self._asked_for.append(tensor.detach())
            name = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            writable = storage.data_ptr() in self._writable
            self._buffers[key] = Buffer(start, nbytes, writable, name)

    def buffers(self):
        return list(self._buffers.values())
