"""genkern: fused, twice-differentiable PyTorch kernels for training generative models."""

from genkern import losses
from genkern.backend import explain, use_backend
from genkern.ops.attention.op import attention

__all__ = ["attention", "explain", "losses", "use_backend"]
__version__ = "0.1.0"
