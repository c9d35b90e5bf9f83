"""Which memory a kernel may touch, learnt from the tensors whose addresses its op asked for."""

import contextlib

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

# What these give, kernels may write. torch.frombuffer lends the memory of spectral_norm's outputs.
_ALLOCATIONS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "zeros"),
    (torch, "zeros_like"),
    (torch, "frombuffer"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
    (torch.Tensor, "new_zeros"),
)


class WatchedMemory(contextlib.ExitStack):
    """Inside the `with`, `buffers()` are the elements of every tensor whose data_ptr() was called
    and whose memory somebody still has: writable where torch.empty and the like gave them inside
    too, or where an op announced its write by increment_version, else write-protected. Memory that
    nobody has any more is no buffer: on a GPU it would be the next tensor's."""

    def __init__(self):
        super().__init__()
        self._storages = {}  # by address; held, so that no address is used twice
        self._writable = set()  # addresses of storages
        self._buffers = {}

    def __enter__(self):
        # At its first dual number torch compiles rules that allocate, and what is put in place of
        # its functions here cannot be compiled.
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
        # By name and not by a mode of torch's dispatcher, which custom ops switch off.
        for owner, name in _ALLOCATIONS:
            self._replace(owner, name, self._allocating)
        self._replace(torch.autograd.graph, "increment_version", self._announcing)
        self._replace(torch.Tensor, "data_ptr", self._asking)
        return super().__enter__()

    def _replace(self, owner, name, watched):
        inherited = name not in vars(owner)
        before = getattr(owner, name)
        setattr(owner, name, watched(before))
        self.callback(*((delattr, owner, name) if inherited else (setattr, owner, name, before)))

    def _allocating(self, allocate):
        def allocating(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            self._allow_writes(tensor)
            return tensor

        return allocating

    def _announcing(self, increment):
        def announcing(tensors):
            for tensor in (tensors,) if isinstance(tensors, torch.Tensor) else tensors:
                self._allow_writes(tensor)
            increment(tensors)

        return announcing

    def _asking(self, data_ptr):
        def asking(tensor):
            self.add(tensor)
            return data_ptr(tensor)

        return asking

    def _allow_writes(self, tensor):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta:
            return  # it has no memory
        if is_functorch_wrapped_tensor(tensor):
            return  # nor has what torch.func's transforms see
        self._writable.add(self._hold(tensor.untyped_storage()))

    def _hold(self, storage):
        self._storages[storage.data_ptr()] = storage
        return storage.data_ptr()

    def _is_freed(self, address):
        """Whether what is held here is all that keeps a storage."""
        return torch._C._storage_Use_Count(self._storages[address]._cdata) == 1

    def add(self, tensor):
        if tensor.numel() == 0:
            return
        storage = tensor.untyped_storage()
        start = storage.data_ptr() + tensor.storage_offset() * tensor.element_size()
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        key = start, (last + 1) * tensor.element_size()
        if key not in self._buffers:
            name = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            self._buffers[key] = self._hold(storage), name

    def buffers(self):
        from genkern.ptx import Buffer

        return [
            Buffer(start, nbytes, storage in self._writable, name)
            for (start, nbytes), (storage, name) in self._buffers.items()
            if not self._is_freed(storage)
        ]
