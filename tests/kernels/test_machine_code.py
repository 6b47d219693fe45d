"""What a program of a GPU waits for between its products."""

from __future__ import annotations

import pytest

from gristmill.kernels.machine_code import waits

LOAD, SCALE = "LDG.E R12, desc[UR22][R2.64]", "FMUL R13, R12.reuse, R25"
WIDE = "@!P3 LDG.E.64 R12, desc[UR22][R2.64+0x80]"
PRODUCT, END = "QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24, gsb0", "@P0 BRA `(.L_x_1)"


def listing(*lines: str) -> str:
    """As nvdisasm has it: labels end in colons, instructions have an address before and a semicolon behind."""
    return "\n".join(
        f"{line}" if line.endswith(":") else f"        /*{16 * at:04x}*/                   {line} ;"
        for at, line in enumerate(lines)
    )


@pytest.mark.parametrize(
    ("body", "waited"),
    [
        pytest.param([LOAD, SCALE, PRODUCT], [f"{LOAD} <- {SCALE}"], id="scaled first"),
        pytest.param([LOAD, PRODUCT, SCALE], [], id="scaled while the product is taken"),
        pytest.param([SCALE, LOAD, PRODUCT], [], id="scaled in the next turn"),
        pytest.param(
            [SCALE, PRODUCT, LOAD], [f"{LOAD} <- {SCALE}"], id="read after the product, scaled before the next"
        ),
        pytest.param(
            [WIDE, "FMUL R1, R13, R1", PRODUCT], [f"{WIDE} <- FMUL R1, R13, R1"], id="the second of two words"
        ),
        pytest.param([LOAD, "FMUL R1, R120, R1", PRODUCT, SCALE], [], id="another register"),
        pytest.param(
            ["LDGSTS.E [R12], desc[UR4][R2.64]", "IADD3 R12, R12, 1, RZ", PRODUCT], [], id="not to a register"
        ),
        pytest.param(["@P1 BRA `(.L_x_2)", LOAD, SCALE, ".L_x_2:", PRODUCT], [], id="not in every turn"),
    ],
)
def test_waits_of_a_loop(body: list[str], waited: list[str]) -> None:
    assert waits(listing(LOAD, SCALE, ".L_x_1:", *body, END, "EXIT")) == waited


def test_products_that_wait_for_each_other() -> None:
    """Where numbers are written into a sum's registers while products may still be under way, ptxas lets none be."""
    done, later = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x3"
    alone = waits(listing(".L_x_1:", PRODUCT, done, PRODUCT, done, END))
    assert alone == ["each other, 2 products one by one"]
    for body in ([PRODUCT, PRODUCT, done], [PRODUCT, later, PRODUCT, later], [PRODUCT, done]):
        assert not waits(listing(".L_x_1:", *body, END))


def test_what_is_around_the_loop_of_products_is_not_looked_at() -> None:
    """Neither an outer loop, nor the way back from where a barrier is waited for, which no condition is on."""
    spin = ".L_x_3:", "@!P5 BRA `(.L_x_3)", "BRA `(.L_x_4)"
    inner = ".L_x_1:", "@!P5 BRA `(.L_x_3)", ".L_x_4:", PRODUCT, END
    assert not waits(listing(".L_x_0:", LOAD, SCALE, *inner, "@P2 BRA `(.L_x_0)", "EXIT", *spin))


def test_a_program_without_products() -> None:
    assert not waits(listing(".L_x_1:", LOAD, SCALE, END, "EXIT"))
    assert not waits("")
