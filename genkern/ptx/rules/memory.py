"""ld, st, atom, red, fences, cp.async, prefetches."""

from genkern.ptx.errors import UnsupportedPTX
from genkern.ptx.program import SIZES, Immediate, Sink, Vector
from genkern.ptx.rules.table import Rule

_SPACE = "(space=.global|.shared|.shared::cta|.local|.const)?"
_TYPE = "(type=.b8|.b16|.b32|.b64|.u8|.u16|.u32|.u64|.s8|.s16|.s32|.s64|.f32|.f64|.b128)"
_VECTOR = "(vector=.v2|.v4|.v8)?"
_SCOPE = "(.cta|.cluster|.gpu|.sys)"
_HINTS = (
    "(.L1::evict_normal|.L1::evict_unchanged|.L1::evict_first|.L1::evict_last|.L1::no_allocate)?"
    "(.L2::evict_normal|.L2::evict_first|.L2::evict_last)?"
    "(hint=.L2::cache_hint)?(.L2::64B|.L2::128B|.L2::256B)?"
)


def _space(words):
    return {"none": "generic", "const": "global", "shared_cta": "shared"}.get(
        words["space"], words["space"]
    )


def _elements(operand, words):
    count = int(words["vector"][1:]) if words["vector"] != "none" else 1
    elements = operand.elements if isinstance(operand, Vector) else (operand,)
    if len(elements) != count:
        raise UnsupportedPTX(f"{count} elements expected")
    return elements


def _drop_hint(instruction, words, expected):
    """An eviction policy changes nothing here."""
    operands = instruction.operands
    if words.get("hint", "none") != "none":
        expected += 1
    if len(operands) != expected:
        raise UnsupportedPTX(f"{expected} operands expected")
    return operands


def _load(translator, instruction, words):
    to, address = _drop_hint(instruction, words, 2)[:2]
    elements = _elements(to, words)
    size = SIZES[words["type"]]
    total = size * len(elements)
    access = "strong" if words.get("order", "none") != "none" else "plain"
    if words["type"] == "b128" or total > 32:
        raise UnsupportedPTX("accesses of at most 32 bytes, no b128")
    place = translator.address(address)
    text = (
        f"{{ const u8* from = read_{_space(words)}(t, {place}, {total}, {instruction.line}, "
        f"{access}); "
    )
    # All are loaded before any is assigned: the address may lie in one of the targets.
    for i, element in enumerate(elements):
        if not isinstance(element, Sink):
            text += f"const {words['type']} v{i} = loaded<{words['type']}>(from + {i * size}); "
    for i, element in enumerate(elements):
        if not isinstance(element, Sink):
            text += translator.assign_wide(element, words["type"], f"v{i}") + " "
    return text + _acquired(words) + "}"


def _acquired(words):
    return "fence_device(t); " if words.get("order", "none") in ("acquire", "release") else ""


def _store(translator, instruction, words):
    address, source = _drop_hint(instruction, words, 2)[:2]
    elements = _elements(source, words)
    type_ = words["type"]
    size = SIZES[type_]
    total = size * len(elements)
    if type_ == "b128" or total > 32:
        raise UnsupportedPTX("accesses of at most 32 bytes, no b128")
    access = "strong" if words.get("order", "none") != "none" else "plain"
    text = "{ " + _acquired(words) + f"u8 data[{total}]; "
    for i, element in enumerate(elements):
        text += f"stored<{type_}>(data + {i * size}, {translator.source_wide(element, type_)}); "
    return text + (
        f"memcpy(write_{_space(words)}(t, {translator.address(address)}, {total}, "
        f"{instruction.line}, {access}, data), data, {total}); }}"
    )


def _load_param(translator, instruction, words):
    to, address = instruction.operands
    elements = _elements(to, words)
    type_ = words["type"]
    size = SIZES[type_]
    place = translator.parameter(address, size * len(elements), instruction, writes=False)
    text = "{ const u8* from = " + place + "; "
    for i, element in enumerate(elements):
        value = f"loaded<{type_}>(from + {i * size})"
        text += translator.assign_wide(element, type_, value) + " "
    return text + "}"


def _store_param(translator, instruction, words):
    address, source = instruction.operands
    elements = _elements(source, words)
    type_ = words["type"]
    size = SIZES[type_]
    place = translator.parameter(address, size * len(elements), instruction, writes=True)
    text = "{ u8* to = " + place + "; "
    for i, element in enumerate(elements):
        text += f"stored<{type_}>(to + {i * size}, {translator.source_wide(element, type_)}); "
    return text + "}"


_ATOMIC = {
    "add": "old + x",
    "and": "old & x",
    "or": "old | x",
    "xor": "old ^ x",
    "min": "least(old, x)",
    "max": "greatest(old, x)",
    "exch": "x",
    "inc": "old >= x ? 0 : old + 1",
    "dec": "old == 0 || old > x ? x : old - 1",
    "cas": "old == x ? y : old",
}
# An atomic add in floating point; f32 in global memory flushes nothing on today's hardware.
_ATOMIC_FLOAT = {
    "f32": "add<rn, none, none>(old, x)",
    "f64": "add<rn, none, none>(old, x)",
    "f16": "half_add<none, none>(old, x)",
    "bf16": "half_add<none, none>(old, x)",
    "f16x2": "each(old, x, [](f16 a, f16 b) { return half_add<none, none>(a, b); })",
    "bf16x2": "each(old, x, [](bf16 a, bf16 b) { return half_add<none, none>(a, b); })",
}


def _atomic(translator, instruction, words):
    operands = list(_drop_hint(instruction, words, words["arity"]))
    operation, type_ = words["op"], words["type"]
    to = operands.pop(0) if words["returns"] else Sink()
    address, *values = operands
    semantics = words.get("order", "none") if words.get("order", "none") != "none" else "relaxed"
    space = _space(words)
    text = "{ "
    for name, operand in zip("xy", values, strict=False):
        text += f"const {type_} {name} = {translator.source(operand, type_)}; "
    text += (
        f"u8* at = atomic_{space}(t, {translator.address(address)}, {SIZES[type_]}, "
        f"{instruction.line}, {semantics}); const {type_} old = loaded<{type_}>(at); "
    )
    value = _ATOMIC[operation] if type_ not in _ATOMIC_FLOAT or operation == "exch" else None
    value = value or _ATOMIC_FLOAT[type_]
    text += f"stored<{type_}>(at, {value}); "
    if not isinstance(to, Sink):
        text += translator.assign(to, type_, "old")
    return text + " }"


def _atom(translator, instruction, words):
    arity = 4 if words["op"] == "cas" else 3
    return _atomic(translator, instruction, {**words, "returns": True, "arity": arity})


def _red(translator, instruction, words):
    return _atomic(translator, instruction, {**words, "returns": False, "arity": 2})


def _copy(translator, instruction, words):
    operands = list(instruction.operands)
    if words["hint"] != "none":
        operands.pop()
    if len(operands) not in (3, 4) or not isinstance(operands[2], Immediate):
        raise UnsupportedPTX("cp.async with a target, a source and a constant size expected")
    size = translator.constant(operands[2])
    if size not in ((16,) if words["cache"] == "cg" else (4, 8, 16)):
        raise UnsupportedPTX(f"cp.async cannot copy {size} bytes")
    source_size = translator.source(operands[3], "u32") if len(operands) == 4 else str(size)
    to, source = translator.address(operands[0]), translator.address(operands[1])
    return f"copy_async(t, {to}, {source}, {size}, {source_size}, {instruction.line});"


def _wait_group(translator, instruction, words):
    if len(instruction.operands) != 1:
        raise UnsupportedPTX("one operand expected")
    left = translator.source(instruction.operands[0], "u32")
    return f"wait_for_copies(t, {left}, false, {instruction.line});"


def _wait_all(translator, instruction, words):
    return f"wait_for_copies(t, 0, true, {instruction.line});"


def _commit(translator, instruction, words):
    return "commit_copies(t);"


def _fence(translator, instruction, words):
    return "fence_device(t);"


def _sequential_fence(translator, instruction, words):
    return "fence_device(t, true);"


def _nothing(translator, instruction, words):
    return ";"


_ORDER = "(order=.volatile)?"
# Triton writes the space first.
_ATOM_SEMANTICS = (
    f"(order=.relaxed|.acquire|.release|.acq_rel)?{_SCOPE}?(space=.global|.shared|.shared::cta)?",
    f"(space=.global|.shared|.shared::cta){_SCOPE}(order=.relaxed|.acquire|.release|.acq_rel)",
)
_HINT = "(hint=.L2::cache_hint)?"
_INTEGER_ATOMICS = (
    f"(op=.add){_HINT}(type=.u32|.s32|.u64)",
    f"(op=.and|.or|.xor){_HINT}(type=.b32|.b64)",
    f"(op=.min|.max){_HINT}(type=.u32|.s32|.u64|.s64)",
    f"(op=.inc|.dec){_HINT}(type=.u32)",
    f"(op=.add){_HINT}(type=.f32|.f64)",
    f"(op=.add).noftz{_HINT}(type=.f16|.bf16|.f16x2|.bf16x2)",
)

RULES = [
    Rule(f"ld{_ORDER}{_SPACE}{_VECTOR}{_TYPE}", "", _load),
    Rule(f"ld(.weak)?{_SPACE}(.ca|.cg|.cs|.lu|.cv)?{_HINTS}{_VECTOR}{_TYPE}", "", _load),
    Rule(f"ld(order=.relaxed|.acquire){_SCOPE}{_SPACE}{_HINTS}{_VECTOR}{_TYPE}", "", _load),
    Rule(f"ld(space=.global)(.ca|.cg|.cs)?.nc{_HINTS}{_VECTOR}{_TYPE}", "", _load),
    Rule(f"ldu(space=.global)?{_VECTOR}{_TYPE}", "", _load),
    Rule(f"ld.param{_VECTOR}{_TYPE}", "", _load_param),
    Rule(f"st{_ORDER}{_SPACE}{_VECTOR}{_TYPE}", "", _store),
    Rule(f"st(.weak)?{_SPACE}(.wb|.cg|.cs|.wt)?{_HINTS}{_VECTOR}{_TYPE}", "", _store),
    Rule(f"st(order=.relaxed|.release){_SCOPE}{_SPACE}{_HINTS}{_VECTOR}{_TYPE}", "", _store),
    Rule(f"st.param{_VECTOR}{_TYPE}", "", _store_param),
    *(
        Rule(f"atom{semantics}{tail}", "", _atom)
        for semantics in _ATOM_SEMANTICS
        for tail in (
            *_INTEGER_ATOMICS,
            f"(op=.exch){_HINT}(type=.b32|.b64)",
            f"(op=.cas){_HINT}(type=.b16|.b32|.b64)",
        )
    ),
    *(
        Rule(f"red{semantics}{tail}", "", _red)
        for semantics in _ATOM_SEMANTICS
        for tail in _INTEGER_ATOMICS
    ),
    # From sm_70 on, membar is another name of fence.sc.
    Rule("membar(.gl|.sys)", "", _sequential_fence),
    Rule("membar.cta", "", _nothing),
    Rule("fence.sc(.gpu|.sys|.cluster)", "", _sequential_fence),
    Rule("fence(.acq_rel)?(.gpu|.sys|.cluster)", "", _fence),
    Rule("fence(.sc|.acq_rel)?.cta", "", _nothing),
    Rule("fence.proxy.async(.global|.shared::cta|.shared::cluster)?", "", _nothing),
    Rule(
        f"cp.async(cache=.ca|.cg).shared(::cta)?.global{_HINT}(.L2::64B|.L2::128B|.L2::256B)?",
        "",
        _copy,
    ),
    Rule("cp.async.commit_group", "", _commit),
    Rule("cp.async.wait_group", "", _wait_group),
    Rule("cp.async.wait_all", "", _wait_all),
    # Hints about caches; the address is not checked, since it need not be valid.
    Rule("prefetch(.global|.local)?(.L1|.L2)(::evict_last|::evict_normal)?", "", _nothing),
    Rule("prefetchu.L1", "", _nothing),
    Rule(
        "createpolicy.fractional(.L2::evict_last|.L2::evict_first|.L2::evict_normal)"
        "(.L2::evict_unchanged|.L2::evict_first)?.b64",
        "",
        lambda translator, instruction, words: translator.assign(
            instruction.operands[0], "b64", "0"
        ),
    ),
]
