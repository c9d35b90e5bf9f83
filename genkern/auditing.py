"""`genkern.audit(D, x)`: does a gradient penalty train this model, and if not, which module is to
blame?

R1's gradient in the weights is ∇_θ ½‖g‖² = (∂g/∂θ)ᵀ·g with g = ∇_x Σ D(x), a second derivative. The
same number is a derivative of first derivatives, along v = g:

    ∇_θ ½‖g‖²  =  d/dε ∇_θ Σ D(x + ε·v) at ε = 0

whose right side needs no second derivative of any module: two first-order gradients and a central
difference, in fp64, give it to about nine digits. Where the two differ, each module is put to the
same test by itself, on the inputs that it met in the model: the gradients of ⟨∇_a⟨M(a), c⟩, v⟩ in
its weights, its inputs a and the cotangent c against central differences along v. The innermost
modules that fail are the ones to blame.

Every run begins with the same buffers (batch statistics, u and v of spectral norm) and the same
random state, so that both sides are of one function. All of it happens on a copy.
"""

import copy
import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

# Steps, as parts of the inputs' size, and what may differ, as a part of the largest element. Where
# the kink of a ReLU lies between the two points, a difference is wrong: an element is wrong when it
# is so at every step, each at a point of its own.
STEPS = {torch.float64: (1e-6, 3e-7, 1e-7), torch.float32: (2e-3, 4e-4, 1e-4)}
LIMITS = {torch.float64: 1e-5, torch.float32: 5e-2}
JITTER = 1e-2  # how far those points lie apart, as a part of the largest input


class Fault(NamedTuple):
    """module: its name in the model, "" for the model itself. kind: "raises" (its second derivative
    raises an error), "missing" (it is dropped without a word) or "wrong". why: a sentence."""

    module: str
    kind: str
    why: str

    def __str__(self):
        return f"{self.module or 'the model itself'}: second derivative {self.kind}: {self.why}"


@dataclass
class Audit:
    """What `audit` found. ok: the penalty's gradient is right. error: its largest difference from
    the reference path, as a part of the largest element; inf where it could not be computed.
    faults: the modules to blame. dtype: what it was computed in."""

    ok: bool
    error: float
    dtype: torch.dtype
    faults: list[Fault] = field(default_factory=list)

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        if self.ok and self.error > LIMITS[self.dtype]:
            return (
                f"genkern.audit: no module is at fault, and {dtype} compares the whole too coarsely"
            )
        if self.ok:
            return f"genkern.audit: R1's gradient is right (error {self.error:.1e}, {dtype})"
        lines = [f"genkern.audit: R1's gradient is wrong (error {self.error:.1e}, {dtype})"]
        return "\n".join([*lines, *(f"  {fault}" for fault in self.faults)])


def audit(D, x, *args, dtype=torch.float64, **kwargs):
    """Checks that a gradient penalty trains the discriminator `D`: computes the gradient of R1,
    ½‖∇_x Σ D(x)‖², in D's weights through D as it is and by a reference path that needs no second
    derivatives, and names the modules whose second derivative raises, is missing or is wrong.

        print(genkern.audit(D, real, labels))

    D: any module; it is called as D(x, *args, **kwargs), in the mode it is in, as a copy in
        `dtype`. It gives a tensor, or tensors in tuples, lists and dicts, which are summed.
    x: floating, any shape; a small batch suffices.
    dtype: float64, or float32 for modules that can do no other: then only a module by itself can be
        found wrong, not what the model's own forward does between its modules. Floating tensors
        among the arguments are cast, too.

    Returns an `Audit`: `ok`, `error`, `faults`, and a report as its str(). A module is blamed when
    none of the modules inside it is; what it calls beyond modules (functional attention, an
    autograd.Function) is named as found in its graph.

    Raises TypeError for other arguments, ValueError for other dtypes, and whatever D itself raises
    in its forward or first backward.

    Sources: R1, Mescheder et al. 2018, eq. 9; the derivative along a gradient as a difference of
    gradients, Pearlmutter 1994, section 2.
    """
    if not isinstance(D, nn.Module):
        raise TypeError(f"audit: D must be an nn.Module, not {type(D).__name__}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"audit: x must be a floating tensor, not {kind}")
    if dtype not in STEPS:
        raise ValueError(f"audit: dtype must be torch.float64 or torch.float32, not {dtype}")
    model = copy.deepcopy(D).to(dtype).requires_grad_(True)
    arguments = _cast(((x, *args), kwargs), dtype)
    whole = _Subject("", model, arguments, [0])
    error, fault = whole.examine(ones=True)
    if fault is None:
        return Audit(True, error, dtype)
    faults = _faults_inside(model, whole)
    if not faults and fault.kind != "raises" and dtype == torch.float32:
        return Audit(True, error, dtype)  # the kinks of a whole model: see STEPS
    return Audit(False, error, dtype, faults or [fault])


def _faults_inside(model, whole):
    """The innermost faulty modules, in the order of their calls."""
    faults = {}
    subjects = _subjects(model, whole)
    for name in sorted(subjects, key=lambda name: -name.count(".")):  # inner ones first
        if not any(blamed.startswith(f"{name}.") for blamed in faults):
            _, fault = subjects[name].examine()
            if fault is not None:
                faults[name] = fault
    return [faults[name] for name in subjects if name in faults]


def _subjects(model, whole):
    """By name, in the order of their calls: the modules whose inputs depend on x (not those that
    make weights), each with the arguments of its first call."""
    subjects, handles = {}, []

    def hook_for(name):
        def hook(module, *arguments):
            leaves = tree_flatten(arguments)[0]
            places = [i for i, x in enumerate(leaves) if _is_floating(x) and x.requires_grad]
            if name not in subjects and places:
                # Copies: a module may write into its inputs.
                subjects[name] = _Subject(name, module, _map(_copied, arguments), places)

        return hook

    for name, module in model.named_modules():
        if name and not isinstance(module, torch.jit.ScriptModule):
            hook = hook_for(name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
    model.requires_grad_(False)
    try:
        with whole.same_start():
            whole.call(whole.inputs())
    finally:
        model.requires_grad_(True)
        for handle in handles:
            handle.remove()
    for subject in subjects.values():
        subject.take_state()
    return subjects


class _Subject:
    """A module, the (args, kwargs) that it is examined with, and which of their leaves vary."""

    def __init__(self, name, module, arguments, places):
        self.name, self.module, self.places = name, module, places
        self.leaves, self.structure = tree_flatten(arguments)
        self.take_state()

    def take_state(self):
        """Everything begins again as it is now."""
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.buffers = [
            (owner, name, buffer.clone())
            for owner in self.module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self.devices = {p.device for p in self.module.parameters() if p.is_cuda}

    def inputs(self, jitter=0.0):
        values = [self.leaves[i].detach().clone() for i in self.places]
        if jitter:
            generator = torch.Generator().manual_seed(2)
            values = [x + jitter * _largest([x]) * _drawn(x, generator) for x in values]
        return [x.requires_grad_() for x in values]

    @contextmanager
    def same_start(self):
        """Buffers and random numbers as at the first time; the latter are given back."""
        with torch.random.fork_rng(self.devices), torch.enable_grad():
            torch.manual_seed(0)
            for owner, name, first in self.buffers:
                owner._buffers[name] = first.clone()
            yield

    def call(self, inputs):
        """The module's floating outputs that have gradients."""
        leaves = list(self.leaves)
        for place, x in zip(self.places, inputs, strict=True):
            leaves[place] = x.clone()  # the module may write into it
        args, kwargs = tree_unflatten(leaves, self.structure)
        outputs = tree_flatten(self.module(*args, **kwargs))[0]
        return [out for out in outputs if _is_floating(out) and out.requires_grad]

    def examine(self, ones=False):
        """(error, Fault or None), by the gradients of ⟨∇_a⟨M(a), c⟩, v⟩. ones: c = 1 and v = ∇_a,
        as R1 has them; otherwise both are drawn."""
        least, dtype = None, self.leaves[self.places[0]].dtype
        for tried, step in enumerate(STEPS[dtype]):
            inputs = self.inputs(JITTER * tried)
            cotangents, along = self._directions(inputs, ones)
            size = _largest(along)
            if not cotangents or size == 0:
                return 0.0, None  # nothing here depends on x
            expected = self._difference(
                inputs, along, cotangents, step * (_largest(inputs) or 1.0) / size
            )
            try:
                got, outputs = self._second(inputs, along, cotangents)
            except Exception as error:  # whatever a module's backward may raise
                said = " ".join(str(error).split())
                return math.inf, Fault(self.name, "raises", f"{type(error).__name__}: {said}")
            differences = _differences(got, expected)
            least = list(map(torch.minimum, least, differences)) if least else differences
            error = _largest(least)
            if error <= LIMITS[dtype]:
                return error, None
        differing = [
            x
            for x, difference in zip(got, least, strict=True)
            if _largest([difference]) > LIMITS[dtype]
        ]
        return error, Fault(self.name, *_verdict(differing, outputs, error))

    def _directions(self, inputs, ones):
        """c, v"""
        generator = torch.Generator().manual_seed(1)
        with self.same_start():
            outputs = self.call(inputs)
        if not ones:
            return [_drawn(x, generator) for x in outputs], [_drawn(x, generator) for x in inputs]
        cotangents = [torch.ones_like(x) for x in outputs]
        first, _ = self._first(inputs, cotangents)
        return cotangents, first[: len(inputs)]

    def _first(self, inputs, cotangents):
        """∇⟨M(a), c⟩ in inputs and parameters, zeros where there is none; and the outputs."""
        targets = [*inputs, *self.parameters]
        with self.same_start():
            outputs = self.call(inputs)
            grads = torch.autograd.grad(outputs, targets, cotangents, allow_unused=True)
        return _filled(grads, targets), [x.detach() for x in outputs]

    def _second(self, inputs, along, cotangents):
        """The gradients of ⟨∇_a⟨M(a), c⟩, v⟩ in inputs, parameters and c, zeros where there is
        none; and the outputs, for their graph."""
        cotangents = [c.clone().requires_grad_() for c in cotangents]
        targets = [*inputs, *self.parameters, *cotangents]
        for x in targets:
            x.grad = None
        with self.same_start():
            outputs = self.call(inputs)
            grads = torch.autograd.grad(
                outputs, inputs, cotangents, create_graph=True, allow_unused=True
            )
            pairs = [
                (g, v)
                for g, v in zip(grads, along, strict=True)
                if g is not None and g.requires_grad
            ]
            if pairs:
                # As a training loop would: torch.autograd.grad leaves out nodes that raise.
                torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        return _filled([x.grad for x in targets], targets), outputs

    def _difference(self, inputs, along, cotangents, step):
        """What `_second` should be: the central difference along v of the first gradients, and for
        c of the outputs."""
        sides = []
        for sign in (step, -step):
            moved = [x.detach() + sign * v for x, v in zip(inputs, along, strict=True)]
            grads, outputs = self._first([x.requires_grad_() for x in moved], cotangents)
            sides.append([*grads, *outputs])
        return [(a - b) / (2 * step) for a, b in zip(*sides, strict=True)]


# ---- Tensors ------------------------------------------------------------------------------------


def _is_floating(x):
    return isinstance(x, Tensor) and x.is_floating_point()


def _map(function, tree):
    leaves, structure = tree_flatten(tree)
    return tree_unflatten([function(x) for x in leaves], structure)


def _copied(x):
    return x.detach().clone() if isinstance(x, Tensor) else x


def _cast(tree, dtype):
    return _map(lambda x: x.detach().to(dtype, copy=True) if _is_floating(x) else x, tree)


def _filled(gradients, like):
    return [
        torch.zeros_like(x) if g is None else g.detach()
        for g, x in zip(gradients, like, strict=True)
    ]


def _drawn(like, generator):
    """Random numbers in the shape of `like`."""
    drawn = torch.randn(like.shape, dtype=torch.float64, generator=generator)
    return drawn.to(like.device, like.dtype)


def _largest(tensors):
    """The largest absolute value; inf where there is a NaN."""
    values = [x.abs().max().item() for x in tensors if x.numel()]
    return math.inf if any(map(math.isnan, values)) else max(values, default=0.0)


def _differences(got, expected):
    """Of every element, as a part of the largest one of all."""
    scale = max(_largest(got), _largest(expected)) or 1.0
    return [(a - b).abs() / scale for a, b in zip(got, expected, strict=True)]


# ---- The graph ----------------------------------------------------------------------------------


def _verdict(differing, outputs, error):
    """Kind and reason of a fault, from the gradients that are not as they should be."""
    suspects = ", ".join(_suspects(outputs))
    within = f"; its graph holds {suspects}" if suspects else ""
    if not any(x.any() for x in differing):
        return "missing", f"a penalty's gradient is dropped in it{within}"
    return "wrong", f"differs from a difference of gradients by {error:.1e}{within}"


def _suspects(outputs):
    """Names of the graph's nodes that are custom, or known to have no second derivative."""
    names, seen = [], set()
    ahead = [x.grad_fn for x in outputs]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
        custom = isinstance(node, torch.autograd.function.BackwardCFunction)
        name = type(node).__name__
        if (custom or "Fused" in name or "Flash" in name) and name not in names:
            names.append(name)
    return names
