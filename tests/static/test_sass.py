"""Reading machine code: instructions, loops, and which loop is the inner one."""

from genkern.static import sass

# A prologue, a loop over tiles, in it a loop with tensor cores and one without, the padding.
LISTING = """
	code for sm_80
		Function : first
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x00000a0000017a02 */
                                                                  /* 0x000fe40000000f00 */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;        /* 0x0 */
        /*0020*/                   LDSM.16.M88.4 R8, [R3] ;       /* 0x0 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;  /* 0x0 */
        /*0040*/               @P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;  /* 0x0 */
        /*0050*/                   FFMA R0, R1, R2, R3 ;          /* 0x0 */
        /*0060*/              @!P1 BRA 0x20 ;                     /* 0x0 */
        /*0070*/                   LDS R0, [R1] ;                 /* 0x0 */
        /*0080*/              @!P1 BRA 0x70 ;                     /* 0x0 */
        /*0090*/              @!P2 BRA 0x10 ;                     /* 0x0 */
        /*00a0*/                   STG.E [R2.64], R0 ;            /* 0x0 */
        /*00b0*/                   EXIT ;                         /* 0x0 */
        /*00c0*/                   BRA 0xc0;                      /* 0x0 */
		Function : second
        /*0000*/                   FFMA R0, R1, R2, R3 ;          /* 0x0 */
        /*0010*/                   EXIT ;                         /* 0x0 */
"""


def listing(*lines):
    rows = "\n".join(f"        /*{16 * i:04x}*/   {line} ;" for i, line in enumerate(lines))
    (code,) = sass.functions(f"\t\tFunction : one\n{rows}\n").values()
    return code


def test_instructions():
    found = sass.functions(LISTING)
    assert list(found) == ["first", "second"]
    assert len(found["first"]) == 13 and len(found["second"]) == 2
    load = found["first"][1]
    assert load == (0x10, "LDG.E.128", "R4, [R2.64]") and load.kind == "global"


def test_loops_are_branches_back_and_padding_is_none():
    assert sass.loops(sass.functions(LISTING)["first"]) == [
        (0x10, 0x90),
        (0x20, 0x60),
        (0x70, 0x80),
    ]


def test_the_inner_loop_holds_the_tensor_cores():
    loop = sass.inner_loop(sass.functions(LISTING)["first"])
    assert loop.is_loop
    assert (loop.all, loop.tensor, loop.memory, loop.rest) == (5, 2, 1, 2)


def test_a_kernel_without_a_loop_counts_as_a_whole():
    loop = sass.inner_loop(sass.functions(LISTING)["second"])
    assert not loop.is_loop and loop.all == 2


def test_of_equal_loops_the_shortest():
    """The loop over whole tiles, not the one that masks."""
    code = listing("HMMA R0", "FADD R0", "FSEL R0", "BRA 0x0", "HMMA R0", "FADD R0", "BRA 0x40")
    assert sass.inner_loop(code).all == 3


def test_the_loop_with_the_most_tensor_cores():
    code = listing("HMMA R0", "BRA 0x0", "HMMA R0", "HMMA R0", "FADD R0", "BRA 0x20")
    assert sass.inner_loop(code).tensor == 2


def test_without_tensor_cores_the_multiply_adds_and_without_these_the_accesses():
    code = listing("LDG R0", "BRA 0x0", "FFMA R0", "BRA 0x20")
    assert sass.inner_loop(code).count["multiply-add"] == 1
    assert sass.inner_loop(code[:2]).memory == 1


def test_unrolled_tensor_cores_beside_a_loop_of_others():
    code = listing("LDG R0", "FFMA R0", "BRA 0x0", "HMMA R0", "EXIT")
    assert not sass.inner_loop(code).is_loop
