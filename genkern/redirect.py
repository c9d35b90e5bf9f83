"""Functions and classes that call genkern's attention where their code names torch's.

A function reaches attention by a name: `F.scaled_dot_product_attention`, or a global of its own.
Its redirected copy has the same bytecode, globals and closure, and other names: under them lie
genkern's functions, put beside torch's in the module or the globals that the name is looked up in.
Nothing that others call is changed, globals that change later are seen, and torch.compile reads the
copy like any function. Functions of the same package are followed where a global names them.
"""

import dis
import sys
import types
from typing import NamedTuple

import torch.nn.functional as F

import genkern

SDPA = "scaled_dot_product_attention"
SUFFIX = "__genkern"
# What may stand between a name and the attribute that is looked up in it.
NEUTRAL = {"PUSH_NULL", "CACHE", "EXTENDED_ARG", "NOP", "PRECALL"}
FOREIGN = ("flash_attn", "xformers", "sageattention")


class Redirected(NamedTuple):
    """result: the redirected copy of a function, or subclass of a class; None where nothing could
    be. left: (where, why) of the calls that stay torch's."""

    result: object
    left: list


def scaled_dot_product_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """`genkern.attention` under torch's argument names."""
    return genkern.attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def restore_class(obj):
    """Undoes `Redirection.of_object`."""
    obj.__class__ = type(obj).__bases__[0]


class Redirection:
    """Redirects functions and classes, each once."""

    def __init__(self):
        self._targets = _targets()
        self._done = {}

    def of_object(self, obj):
        """Gives `obj` the redirected subclass of its class, where there is one."""
        found = self.of_class(type(obj))
        if found.result is not None:
            try:
                obj.__class__ = found.result
            except TypeError as error:  # layouts differ
                return Redirected(None, [*found.left, (type(obj).__name__, str(error))])
        return found

    def of_class(self, cls):
        if cls not in self._done:
            self._done[cls] = self._of_class(cls)
        return self._done[cls]

    def of_function(self, function):
        if function not in self._done:
            self._done[function] = Redirected(None, [])  # where one that calls itself ends
            self._done[function] = self._of_function(function)
        return self._done[function]

    def _of_class(self, cls):
        methods, left = {}, []
        for owner in cls.__mro__:
            if owner is object or _package(owner) in ("torch", "genkern"):
                continue
            for name, member in vars(owner).items():
                is_static = isinstance(member, staticmethod)
                function = member.__func__ if is_static else member
                if not isinstance(function, types.FunctionType) or name == "__init__":
                    continue
                found = self.of_function(function)
                left += found.left
                if found.result is None:
                    continue
                if getattr(cls, name) is function:
                    methods[name] = staticmethod(found.result) if is_static else found.result
                elif "super" in getattr(getattr(cls, name), "__code__", cls).co_names:
                    left.append((f"{owner.__name__}.{name}", "it is called through super()"))
        return Redirected(_subclass(cls, methods) if methods else None, left)

    def _of_function(self, function):
        left, renamed = [], {}
        for code in _codes(function.__code__):
            lookups = list(_lookups(code, function.__globals__))
            for lookup in lookups:
                substitute = self._substitute(function, lookup, left)
                if substitute is None:
                    continue
                if any(x.name == lookup.name and x.value is not lookup.value for x in lookups):
                    why = f"two things in it are called {lookup.name}"
                    left.append((function.__qualname__, why))
                    continue
                renamed[code, lookup.name] = lookup.name + SUFFIX
                lookup.provide(lookup.name + SUFFIX, substitute)
        for cell in function.__closure__ or ():
            if self._target(_content(cell)) is not None:
                left.append((function.__qualname__, "it holds the function in a closure"))
        inner = getattr(function, "__wrapped__", None)
        if isinstance(inner, types.FunctionType) and self.of_function(inner).result is not None:
            left.append((function.__qualname__, "a decorator hides it"))
        return Redirected(_copy(function, renamed) if renamed else None, left)

    def _substitute(self, function, lookup, left):
        """What `lookup` shall find, or None for what it finds now."""
        where, value = function.__qualname__, lookup.value
        if value is UNKNOWN:
            if lookup.name == SDPA and lookup.base != "self":
                left.append((where, f"{SDPA} is looked up in something local"))
            return None
        target = self._target(value)
        if target is not None:
            return target
        if _package(value) in FOREIGN and "att" in getattr(value, "__name__", ""):
            left.append((where, f"{value.__module__}.{value.__name__} is not torch's"))
        if isinstance(value, types.FunctionType) and _package(value) == _package(function):
            found = self.of_function(value)
            left += found.left
            return found.result
        return None

    def _target(self, value):
        try:
            return self._targets.get(value)
        except TypeError:  # not hashable
            return None


def _targets():
    """What is replaced by what. Only functions of loaded libraries can be named by anyone."""
    targets = {F.scaled_dot_product_attention: scaled_dot_product_attention}
    library = sys.modules.get("diffusers.models.attention_dispatch")
    if library is not None:
        from genkern.nn.diffusers import dispatched_attention

        targets[library.dispatch_attention_fn] = dispatched_attention
    return targets


# ---- Code ---------------------------------------------------------------------------------------

UNKNOWN = object()


class _Lookup(NamedTuple):
    """A name in a function's code, what it finds now, in whom, and what the expression began
    with."""

    name: str
    value: object
    owner: object  # the globals, a module, or UNKNOWN
    base: str

    def provide(self, name, value):
        if isinstance(self.owner, dict):
            self.owner[name] = value
        else:
            setattr(self.owner, name, value)


def _codes(code):
    """`code` and those of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _lookups(code, names):
    """The globals that `code` looks up, and attributes of modules and of what can't be known."""
    value, base = UNKNOWN, ""
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in NEUTRAL:
            continue
        if instruction.opname == "LOAD_GLOBAL":
            value, base = names.get(name, UNKNOWN), name
            yield _Lookup(name, value, names, base)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            owner, value = value, UNKNOWN
            if isinstance(owner, types.ModuleType):
                value = getattr(owner, name, UNKNOWN)
            if owner is UNKNOWN or isinstance(owner, types.ModuleType):
                yield _Lookup(name, value, owner, base)
        else:
            value, base = UNKNOWN, name if isinstance(name, str) else ""


def _copy(function, renamed):
    """`function` with other names, by (code, name), in its code."""
    copy = types.FunctionType(
        _renamed(function.__code__, renamed),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    for attribute in ("__kwdefaults__", "__doc__", "__module__", "__qualname__", "__annotations__"):
        setattr(copy, attribute, getattr(function, attribute))
    copy.__dict__.update(vars(function))
    return copy


def _renamed(code, renamed):
    return code.replace(
        co_names=tuple(renamed.get((code, name), name) for name in code.co_names),
        co_consts=tuple(
            _renamed(constant, renamed) if isinstance(constant, types.CodeType) else constant
            for constant in code.co_consts
        ),
    )


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _package(value):
    return str(getattr(value, "__module__", "")).split(".")[0]


# ---- Classes ------------------------------------------------------------------------------------


def _subclass(cls, methods):
    names = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        **methods,
    }
    if cls.__dictoffset__ == 0:
        names["__slots__"] = ()
    return type(cls.__name__, (cls,), names)


def _reduce(obj, protocol):
    """Pickled as an object of its class, which is redirected anew where it is loaded."""
    getstate = getattr(obj, "__getstate__", obj.__dict__.copy)
    return _rebuild, (type(obj).__bases__[0],), getstate()


def _rebuild(cls):
    obj = cls.__new__(cls)
    Redirection().of_object(obj)
    return obj
