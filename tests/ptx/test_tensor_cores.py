"""mma.sync, ldmatrix and stmatrix, against NumPy and the layouts that PTX documents."""

import numpy as np
import pytest
from ptx_conformance import own, run

from genkern import ptx

# PTX's tables of fragments: which element lies in a lane's register j, at place i of it.
A_16BIT = lambda lane, j, i: (lane // 4 + 8 * (j % 2), lane % 4 * 2 + i + 8 * (j // 2))  # noqa: E731
B_16BIT = lambda lane, j, i: (lane % 4 * 2 + i + 8 * j, lane // 4)  # noqa: E731
A_TF32 = lambda lane, j, i: (lane // 4 + 8 * (j % 2), lane % 4 + 4 * (j // 2))  # noqa: E731
B_TF32 = lambda lane, j, i: (lane % 4 + 4 * j, lane // 4)  # noqa: E731
C_F32 = lambda lane, j, i: (lane // 4 + 8 * (j // 2), lane % 4 * 2 + j % 2)  # noqa: E731
C_F16 = lambda lane, j, i: (lane // 4 + 8 * j, lane % 4 * 2 + i)  # noqa: E731
A_F64_8 = lambda lane, j, i: (lane // 4, lane % 4)  # noqa: E731
C_F64_8 = lambda lane, j, i: (lane // 4, lane % 4 * 2 + j)  # noqa: E731


def fragments(matrix, layout, registers, per_register, word):
    """The words of every lane: an array [32, registers]."""
    out = np.zeros((32, registers, per_register), matrix.dtype)
    for lane in range(32):
        for j in range(registers):
            for i in range(per_register):
                out[lane, j, i] = matrix[layout(lane, j, i)]
    return out.reshape(32, -1).view(word)


def assembled(words, layout, shape, per_register, element):
    """The matrix that the lanes hold."""
    parts = words.view(element).reshape(32, -1, per_register)
    out = np.zeros(shape, element)
    for lane in range(32):
        for j in range(parts.shape[1]):
            for i in range(per_register):
                out[layout(lane, j, i)] = parts[lane, j, i]
    return out


def multiply(opcode, a, b, c, d_registers, word, target="sm_100", **options):
    """Runs one mma on the words of the lanes; gives the lanes' words of d."""
    size = np.dtype(word).itemsize
    kind, prefix = (".b32", "%r") if size == 4 else (".b64", "%rd")
    body, at, lists = "", 20, []
    for i, words in enumerate((a, b, c), 1):
        body += own(f"%rd{i}", words.shape[1] * size)
        names = [f"{prefix}{at + j}" for j in range(words.shape[1])]
        body += "".join(
            f"ld.global{kind} {name}, [%rd10+{j * size}];\n" for j, name in enumerate(names)
        )
        at += len(names)
        lists.append("{" + ", ".join(names) + "}")
    targets = [f"{prefix}{at + j}" for j in range(d_registers)]
    body += f"{opcode} {{{', '.join(targets)}}}, {lists[0]}, {lists[1]}, {lists[2]};\n"
    body += own("%rd4", d_registers * size)
    body += "".join(
        f"st.global{kind} [%rd10+{j * size}], {name};\n" for j, name in enumerate(targets)
    )
    out = np.zeros((32, d_registers), word)
    run(body, a, b, c, out, target=target, **options)
    return out


def bits_of(x, element):
    """Floats as their 16 bits, and the floats that those are."""
    if element == "f16":
        half = x.astype(np.float16)
        return half.view(np.uint16), half.astype(np.float64)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def sequential(a, b, c):
    """What the executor says it does: fp32 sums, k after k, each rounded to nearest."""
    total = c.astype(np.float32)
    for k in range(a.shape[1]):
        product = np.multiply.outer(a[:, k], b[k])  # exact in double
        total = (product + total.astype(np.float64)).astype(np.float32)
    return total


@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_products_of_halves(element, k):
    rng = np.random.default_rng(k)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((16, k), (k, 8)))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    (a_bits, a), (b_bits, b) = bits_of(a, element), bits_of(b, element)
    out = multiply(
        f"mma.sync.aligned.m16n8k{k}.row.col.f32.{element}.{element}.f32",
        fragments(a_bits, A_16BIT, k // 4, 2, np.uint32),
        fragments(b_bits, B_16BIT, k // 8, 2, np.uint32),
        fragments(c, C_F32, 4, 1, np.uint32),
        4,
        np.uint32,
    )
    np.testing.assert_array_equal(
        assembled(out, C_F32, (16, 8), 1, np.float32), sequential(a, b, c)
    )


@pytest.mark.parametrize("k", [8, 16])
def test_sums_in_f16(k):
    rng = np.random.default_rng(k)
    (a_bits, a), (b_bits, b), (c_bits, c) = (
        bits_of(rng.standard_normal(s).astype(np.float32), "f16")
        for s in ((16, k), (k, 8), (16, 8))
    )
    out = multiply(
        f"mma.sync.aligned.m16n8k{k}.row.col.f16.f16.f16.f16",
        fragments(a_bits, A_16BIT, k // 4, 2, np.uint32),
        fragments(b_bits, B_16BIT, k // 8, 2, np.uint32),
        fragments(c_bits, C_F16, 2, 2, np.uint32),
        2,
        np.uint32,
    )
    wanted = sequential(a, b, c).astype(np.float16)
    np.testing.assert_array_equal(assembled(out, C_F16, (16, 8), 2, np.float16), wanted)


@pytest.mark.parametrize("k", [4, 8])
def test_tf32_ignores_the_lowest_digits(k):
    rng = np.random.default_rng(k)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((16, k), (k, 8)))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    out = multiply(
        f"mma.sync.aligned.m16n8k{k}.row.col.f32.tf32.tf32.f32",
        fragments(a, A_TF32, k // 2, 1, np.uint32),
        fragments(b, B_TF32, k // 4, 1, np.uint32),
        fragments(c, C_F32, 4, 1, np.uint32),
        4,
        np.uint32,
    )
    cut = lambda x: (x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)  # noqa: E731
    wanted = sequential(cut(a), cut(b), c)
    np.testing.assert_array_equal(assembled(out, C_F32, (16, 8), 1, np.float32), wanted)


@pytest.mark.parametrize(("m", "k"), [(8, 4), (16, 4), (16, 8), (16, 16)])
def test_doubles(m, k):
    rng = np.random.default_rng(m + k)
    a, b, c = (rng.standard_normal(s) for s in ((m, k), (k, 8), (m, 8)))
    if m == 8:
        a_words, c_layout = fragments(a, A_F64_8, 1, 1, np.uint64), C_F64_8
    else:
        a_words, c_layout = fragments(a, A_TF32, k // 2, 1, np.uint64), C_F32
    out = multiply(
        f"mma.sync.aligned.m{m}n8k{k}.row.col.f64.f64.f64.f64",
        a_words,
        fragments(b, B_TF32, k // 4, 1, np.uint64),
        fragments(c, c_layout, m // 4, 1, np.uint64),
        m // 4,
        np.uint64,
    )
    np.testing.assert_allclose(assembled(out, c_layout, (m, 8), 1, np.float64), a @ b + c, 1e-12)


SHARED = ".shared .align 16 .b8 tile[1024];"
FILL = """
mov.u32 %r2, tile;
mad.lo.u32 %r3, %r0, 32, %r2;
mul.wide.u32 %rd10, %r0, 32;
add.s64 %rd10, %rd10, %rd1;
ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd10];
ld.global.v4.b32 {%r24, %r25, %r26, %r27}, [%rd10+16];
st.shared.v4.b32 [%r3], {%r20, %r21, %r22, %r23};
st.shared.v4.b32 [%r3+16], {%r24, %r25, %r26, %r27};
bar.sync 0;
"""


def _rows(rows):
    """The address of each lane's row, from a table in the second parameter."""
    return own("%rd2", 4) + "ld.global.b32 %r4, [%rd10];\nadd.u32 %r4, %r4, %r2;\n", rows


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    rng = np.random.default_rng(count)
    tile = rng.integers(0, 2**16, (64, 8), np.uint16)  # rows of 16 bytes
    rows = rng.permutation(64)[:32].astype(np.uint32)
    address, _ = _rows(rows)
    names = [f"%r{30 + i}" for i in range(count)]
    body = FILL + address
    body += (
        f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{', '.join(names)}}}, [%r4];\n"
    )
    body += own("%rd3", 4 * count)
    body += "".join(f"st.global.b32 [%rd10+{4 * i}], {n};\n" for i, n in enumerate(names))
    out = np.zeros((32, count), np.uint32)
    run(body, tile, rows * 16, out, shared=SHARED)
    halves = out.view(np.uint16).reshape(32, count, 2)
    for m in range(count):
        matrix = tile[rows[8 * m : 8 * m + 8]]
        if trans:
            matrix = matrix.T
        # Eight rows of four lanes, two elements each.
        np.testing.assert_array_equal(halves[:, m].reshape(8, 8), matrix)


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, trans):
    rng = np.random.default_rng(count)
    words = rng.integers(0, 2**16, (32, count, 2), np.uint16)
    rows = rng.permutation(64)[:32].astype(np.uint32)
    address, _ = _rows(rows)
    names = [f"%r{30 + i}" for i in range(count)]
    body = FILL + address + own("%rd3", 4 * count)
    body += "".join(f"ld.global.b32 {n}, [%rd10+{4 * i}];\n" for i, n in enumerate(names))
    body += (
        f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r4], {{{', '.join(names)}}};\n"
    )
    body += """
    bar.sync 0;
    ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r3];
    ld.shared.v4.b32 {%r24, %r25, %r26, %r27}, [%r3+16];
    mul.wide.u32 %rd10, %r0, 32;
    add.s64 %rd10, %rd10, %rd4;
    st.global.v4.b32 [%rd10], {%r20, %r21, %r22, %r23};
    st.global.v4.b32 [%rd10+16], {%r24, %r25, %r26, %r27};
    """
    tile = np.full((64, 8), 7, np.uint16)
    out = np.zeros((64, 8), np.uint16)
    run(body, tile, rows * 16, words, out, shared=SHARED)
    for m in range(count):
        matrix = words[:, m].reshape(8, 8)
        tile[rows[8 * m : 8 * m + 8]] = matrix.T if trans else matrix
    np.testing.assert_array_equal(out, tile)


def test_a_row_that_is_not_aligned():
    body = FILL + "add.u32 %r4, %r2, 8;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r4];\n"
    with pytest.raises(ptx.Misaligned):
        run(body, np.zeros(512, np.uint16), shared=SHARED)


def test_lanes_that_come_to_two_different_mma():
    mma = (
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r20, %r21, %r22, %r23}, "
        "{%r20, %r21, %r22, %r23}, {%r20, %r21}, {%r20, %r21, %r22, %r23};\n"
    )
    body = f"setp.lt.u32 %p1, %r0, 16;\n@%p1 bra LOW;\n{mma}bra DONE;\nLOW:\n{mma}DONE:\n"
    with pytest.raises(ptx.AbsentLane, match="another instruction"):
        run(body)
