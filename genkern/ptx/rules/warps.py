"""What the lanes of a warp do together: shuffles, votes, matches, reductions, tensor cores."""

from genkern.ptx.errors import UnsupportedPTX
from genkern.ptx.program import Pair, Sink, Vector
from genkern.ptx.rules.table import Rule


def _operands(instruction, *counts):
    if len(instruction.operands) not in counts:
        raise UnsupportedPTX(f"{' or '.join(map(str, counts))} operands expected")
    return instruction.operands


def _shuffle(translator, instruction, words):
    to, value, lane, clamp, mask = _operands(instruction, 5)
    value, lane, clamp, mask = (translator.source(o, "u32") for o in (value, lane, clamp, mask))
    first, second = (to.first, to.second) if isinstance(to, Pair) else (to, Sink())
    text = (
        f"{{ bool found; const u32 moved = shuffle(t, {words['mode']}, {value}, {lane}, {clamp}, "
        f"{mask}, &found, {instruction.line}); {translator.assign(first, 'b32', 'moved')} "
    )
    if not isinstance(second, Sink):
        text += translator.assign(second, "pred", "found")
    return text + " }"


def _vote(translator, instruction, words):
    to, value, mask = _operands(instruction, 3)
    mask = translator.source(mask, "u32")
    text = (
        f"{{ const u32 mask = {mask}, ballot = vote_ballot(t, {translator.source(value, 'pred')}, "
        f"mask, {instruction.line}); "
    )
    type_, result = {
        "ballot": ("b32", "ballot"),
        "all": ("pred", "ballot == mask"),
        "any": ("pred", "ballot != 0"),
        "uni": ("pred", "ballot == 0 || ballot == mask"),
    }[words["mode"]]
    return text + translator.assign(to, type_, result) + " }"


def _match(translator, instruction, words):
    to, value, mask = _operands(instruction, 3)
    type_ = "u32" if words["type"] == "b32" else "u64"
    value, mask = translator.source(value, type_), translator.source(mask, "u32")
    if words["mode"] == "any":
        call = f"match_any(t, {value}, {mask}, {instruction.line})"
        return translator.assign(to, "b32", call)
    first, second = (to.first, to.second) if isinstance(to, Pair) else (to, Sink())
    text = (
        f"{{ bool equal; const u32 lanes = match_all(t, {value}, {mask}, &equal, "
        f"{instruction.line}); {translator.assign(first, 'b32', 'lanes')} "
    )
    if not isinstance(second, Sink):
        text += translator.assign(second, "pred", "equal")
    return text + " }"


def _redux(translator, instruction, words):
    to, value, mask = _operands(instruction, 3)
    type_ = words["type"]
    operation = words["op"]
    name = "sum_u32" if operation == "add" else f"{operation}_{type_}"
    call = (
        f"reduce(t, {name}, {translator.source(value, 'u32')}, {translator.source(mask, 'u32')}, "
        f"{instruction.line})"
    )
    return translator.assign(to, "u32", call)


def _redux_float(translator, instruction, words):
    to, value, mask = _operands(instruction, 3)
    greatest = "true" if words["op"] == "max" else "false"
    call = (
        f"reduce_f32(t, {translator.source(value, 'u32')}, {greatest}, {words['abs']}, "
        f"{words['nan']}, {translator.source(mask, 'u32')}, {instruction.line})"
    )
    return translator.assign(to, "u32", call)


def _elect(translator, instruction, words):
    to, mask = _operands(instruction, 2)
    if not isinstance(to, Pair):
        raise UnsupportedPTX("a pair of targets expected")
    text = (
        f"{{ bool elected; const u32 leader = elect(t, {translator.source(mask, 'u32')}, "
        f"&elected, {instruction.line}); "
    )
    if not isinstance(to.first, Sink):
        text += translator.assign(to.first, "b32", "leader") + " "
    return text + translator.assign(to.second, "pred", "elected") + " }"


def _active_mask(translator, instruction, words):
    # Lanes run on their own here: each is alone, which any kernel must be right with.
    return translator.assign(_operands(instruction, 1)[0], "b32", "1u << t.lane")


def _warp_barrier(translator, instruction, words):
    (mask,) = _operands(instruction, 1)
    return f"warp_barrier(t, {translator.source(mask, 'u32')}, {instruction.line});"


def _registers(operand, count):
    elements = operand.elements if isinstance(operand, Vector) else (operand,)
    if len(elements) != count:
        raise UnsupportedPTX(f"{count} registers expected")
    return elements


def _array(translator, name, operand, count, type_="u32"):
    values = ", ".join(translator.source(e, type_) for e in _registers(operand, count))
    return f"const {type_} {name}[{count}] = {{{values}}}; "


def _load_matrices(translator, instruction, words):
    to, address = _operands(instruction, 2)
    count = int(words["count"][1:])
    transposed = "true" if words["trans"] == "trans" else "false"
    text = (
        f"{{ u32 words[{count}]; load_matrices(t, {translator.address(address)}, {count}, "
        f"{transposed}, words, {instruction.line}); "
    )
    for i, element in enumerate(_registers(to, count)):
        text += translator.assign(element, "b32", f"words[{i}]") + " "
    return text + "}"


def _store_matrices(translator, instruction, words):
    address, source = _operands(instruction, 2)
    count = int(words["count"][1:])
    transposed = "true" if words["trans"] == "trans" else "false"
    return (
        "{ "
        + _array(translator, "words", source, count)
        + f"store_matrices(t, {translator.address(address)}, {count}, {transposed}, words, "
        + f"{instruction.line}); }}"
    )


def _multiply(translator, instruction, words):
    d, a, b, c = _operands(instruction, 4)
    k = int(words["k"])
    element = words["element"]
    half_sums = words.get("sums", "f32") == "f16"
    per_register = 1 if element == "tf32" else 2
    a_count, b_count = 16 * k // 32 // per_register, 8 * k // 32 // per_register
    sums = 2 if half_sums else 4
    text = "{ " + _array(translator, "a", a, a_count) + _array(translator, "b", b, b_count)
    text += _array(translator, "c", c, sums) + f"u32 d[{sums}]; "
    text += (
        f"multiply_matrices(t, element_{element}, {k}, {'true' if half_sums else 'false'}, "
        f"a, b, c, d, {instruction.line}); "
    )
    for i, target in enumerate(_registers(d, sums)):
        text += translator.assign(target, "b32", f"d[{i}]") + " "
    return text + "}"


def _multiply_doubles(translator, instruction, words):
    d, a, b, c = _operands(instruction, 4)
    m, k = int(words["m"]), int(words["k"])
    sums = m // 4
    text = "{ " + _array(translator, "a", a, m * k // 32, "u64")
    text += _array(translator, "b", b, k // 4, "u64")
    text += _array(translator, "c", c, sums, "u64") + f"u64 d[{sums}]; "
    text += f"multiply_matrices_f64(t, {m}, {k}, a, b, c, d, {instruction.line}); "
    for i, target in enumerate(_registers(d, sums)):
        text += translator.assign(target, "b64", f"d[{i}]") + " "
    return text + "}"


_MMA = "mma.sync.aligned"

RULES = [
    Rule("shfl.sync(mode=.up|.down|.bfly|.idx).b32", "", _shuffle),
    Rule("vote.sync(mode=.ballot).b32", "", _vote),
    Rule("vote.sync(mode=.all|.any|.uni).pred", "", _vote),
    Rule("match(mode=.any|.all).sync(type=.b32|.b64)", "", _match),
    Rule("redux.sync(op=.add)(type=.u32|.s32)", "", _redux),
    Rule("redux.sync(op=.min|.max)(type=.u32|.s32)", "", _redux),
    Rule("redux.sync(op=.and|.or|.xor)(type=.b32)", "", _redux),
    Rule("redux.sync(op=.min|.max)(abs=.abs)?(nan=.NaN)?.f32", "", _redux_float),
    Rule("elect.sync", "", _elect),
    Rule("activemask.b32", "", _active_mask),
    Rule("bar.warp.sync", "", _warp_barrier),
    Rule(
        "ldmatrix.sync.aligned.m8n8(count=.x1|.x2|.x4)(trans=.trans)?.shared(::cta)?.b16",
        "",
        _load_matrices,
    ),
    Rule(
        "stmatrix.sync.aligned.m8n8(count=.x1|.x2|.x4)(trans=.trans)?.shared(::cta)?.b16",
        "",
        _store_matrices,
    ),
    Rule(f"{_MMA}.m16n8k(k=8|16).row.col.f32(element=.bf16).bf16.f32", "", _multiply),
    Rule(f"{_MMA}.m16n8k(k=8|16).row.col(sums=.f32)(element=.f16).f16.f32", "", _multiply),
    Rule(f"{_MMA}.m16n8k(k=8|16).row.col(sums=.f16)(element=.f16).f16.f16", "", _multiply),
    Rule(f"{_MMA}.m16n8k(k=4|8).row.col.f32(element=.tf32).tf32.f32", "", _multiply),
    Rule(f"{_MMA}.m(m=8)n8k(k=4).row.col.f64.f64.f64.f64", "", _multiply_doubles),
    Rule(f"{_MMA}.m(m=16)n8k(k=4|8|16).row.col.f64.f64.f64.f64", "", _multiply_doubles),
]
