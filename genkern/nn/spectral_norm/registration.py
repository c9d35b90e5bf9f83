"""One layer's weight gets its parametrization, and the module what goes with it."""

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from genkern.nn.spectral_norm.classes import give_own_class, give_torchs_class
from genkern.nn.spectral_norm.layer import SpectralNorm, normalization
from genkern.nn.spectral_norm.state_dicts import translate_on_load


def normalize_layer(module, name, n_power_iterations, eps, dim, order):
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"spectral_norm: module must have a parameter or buffer named {name!r}, and this "
            f"{type(module).__name__} has none"
        )
    if isinstance(weight, nn.parameter.UninitializedTensorMixin):
        raise ValueError(
            f"spectral_norm: module must have its weights, and this {type(module).__name__} is "
            f"lazy: run a forward first"
        )
    if dim is None:
        dim = 1 if isinstance(module, _ConvTransposeNd) else 0
    parametrization = SpectralNorm(weight, n_power_iterations, dim, eps, order)
    parametrize.register_parametrization(module, name, parametrization)
    make_ours(module)
    return module


def make_ours(module):
    """What a module with a `SpectralNorm` needs besides; may be repeated."""
    give_own_class(module)
    if not any(_is_translation(hook) for hook in module._load_state_dict_pre_hooks.values()):
        module.register_load_state_dict_pre_hook(translate_on_load)


def unmake_ours(module):
    """Undoes `make_ours`, once none of the module's weights has a `SpectralNorm`."""
    if parametrize.is_parametrized(module):
        if any(normalization(module, name) is not None for name in module.parametrizations):
            return
        give_torchs_class(module)
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if _is_translation(hook):
            del module._load_state_dict_pre_hooks[key]


def _is_translation(hook):
    return getattr(hook, "hook", None) is translate_on_load  # torch wraps it
