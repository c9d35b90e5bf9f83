"""genkern: fused, twice-differentiable PyTorch kernels for training generative models."""

from genkern import losses
from genkern.backend import explain, use_backend
from genkern.nn.spectral_norm import spectral_norm

__all__ = ["explain", "losses", "spectral_norm", "use_backend"]
__version__ = "0.1.0"
