"""genkern: fused, twice-differentiable PyTorch kernels for training generative models."""

from genkern import losses, nn
from genkern.auditing import audit
from genkern.backend import explain, use_backend
from genkern.nn.spectral_norm import spectral_norm
from genkern.ops.attention.alibi import alibi
from genkern.ops.attention.op import attention, attention_varlen
from genkern.patching import patch, unpatch

__all__ = [
    "alibi",
    "attention",
    "attention_varlen",
    "audit",
    "explain",
    "losses",
    "nn",
    "patch",
    "spectral_norm",
    "unpatch",
    "use_backend",
]
__version__ = "0.1.0"
