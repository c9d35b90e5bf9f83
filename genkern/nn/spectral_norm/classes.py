"""The class of a normalised module.

torch gives a parametrized module a class of its own, which refuses to be pickled, is shared with
the module's copies (so that to remove the parametrization of one breaks the others), and whose
property takes 10 µs to find a weight. The class made here pickles, is made anew for every copy, and
looks first for what the running forward of a whole model has normalised.
"""

import torch
from torch.nn.utils import parametrize

from genkern.nn.spectral_norm import frames
from genkern.nn.spectral_norm.layer import SpectralNorm


def give_own_class(module):
    """A fresh class for a parametrized module, unless something has changed torch's since."""
    base = class_before(module)
    if base is None:
        return
    module.__class__ = base
    _inject(module, tuple(module.parametrizations))


def give_torchs_class(module):
    """A fresh class for a parametrized module, as torch makes it."""
    module.__class__ = class_before(module)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:
        parametrize._inject_property(module, name)


def _inject(module, names):
    parametrize._inject_new_class(module)
    own = type(module)
    for name in names:
        parametrize._inject_property(module, name)
        setattr(own, name, _quick_property(name, getattr(own, name)))
    own.__reduce_ex__ = _reduce
    # Without torch's, deepcopy goes by __reduce_ex__. A __deepcopy__ of the base class stays.
    if "__deepcopy__" in vars(own):
        del own.__deepcopy__


def class_before(module):
    """The class of a parametrized module before torch changed it; None where it was changed again
    after that (by FSDP2, say)."""
    own = type(module)
    parametrized = own.__name__.startswith("Parametrized") and "__getstate__" in vars(own)
    return own.__bases__[0] if parametrized else None


def _quick_property(name, torchs):
    read_as_torch = torchs.fget

    def read(module):
        # Compilers see no frames, and torch's own way knows its cache.
        if not (torch.compiler.is_compiling() or parametrize._cache_enabled):
            chain = module._modules["parametrizations"]._modules[name]
            first, weight = chain._modules["0"], chain._parameters.get("original")
            alone = len(chain._modules) == 1 and weight is not None
            if alone and isinstance(first, SpectralNorm) and frames.are_running():
                ready = first.ready(weight)
                if ready is not None:
                    return ready
        return read_as_torch(module)

    return property(read, torchs.fset)


def _reduce(module, protocol):
    base = class_before(module)
    getstate = getattr(base, "__getstate__", object.__dict__.get("__getstate__"))
    if getstate is object.__dict__.get("__getstate__"):
        state = module.__dict__.copy()
    else:
        state = getstate(module)
    return _rebuild, (base, tuple(module.parametrizations)), state


def _rebuild(base, names):
    module = base.__new__(base)
    _inject(module, names)
    return module
