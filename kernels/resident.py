"""Schedule `resident`: one program keeps all of U on chip and takes every step of the sequence for BLOCK_B batch rows.

Shapes (time-major, contiguous; T steps, B batch, K groups, H hidden, G tiles of gx, S states, P trained vectors; c is
the states but the first side by side):
    gx     [T, B, K, G*H]  input products, and the per-step inputs
    saved  [T, B, K, W, H] the saved tiles in W words (see `tiles`)
    u      [K, products*H, H] weight_hh       bias [K, .*H]  b_hh of the products apart, or None
    params [K, P*H]        the trained vectors, or None
    dropout                what masks are drawn from (see `random`), or None
    y, c   [T+1, B, K, H], [T+1, B, K, (S-1)*H]  states: row t+1 after step t, row 0 before the first (h0, c0: given).
                           With reversed groups [T+2, ...]: theirs start in row T+1. c [1, ...], the start, where
                           nothing is saved. Zero after a step of padding (but see `tiles.after_step`)
    mask   [T, B] uint8 codes (see `buffers`), or None
    hn, cn [K, B, H], [K, B, (S-1)*H]  final states;  dhn, dcn their gradients, or None
    dy     [T, B, K, H]    or None;  dcs [T, B, K, (S-1)*H], of every step's c, or None
    dgx    [T, B, K, G*H];  dhu [T, B, K, .*H], of the products apart;  m [T, B, K, .*H], the computed operands
    dh0, dc0 [K, B, H], [K, B, (S-1)*H];  dparams [batch tiles, K, P*H] in the accumulation type, each program's share
A tile's units beyond H are computed from zeros, and may be anything; the operand of a product is set to zero there.
"""

import triton
import triton.language as tl

from .between import complete_input, load_input, places, project, store_words, word_ptr
from .exchange import shares
from .layout import (
    arrived,
    in_layout_of,
    load_next,
    load_weights,
    memory_rows,
    memory_units,
    read_tiles,
    readable,
    unit_order,
    write_tiles,
)
from .random import draw
from .tiles import (
    after_step,
    apart_before,
    biases,
    cast_tiles,
    first_product,
    inside,
    keep_rows,
    load_mask,
    load_params,
    load_tiles,
    not_reset,
    nth_step,
    operands,
    pack_tiles,
    products,
)


def loads(cell, plan, itemsize, saves):
    """Where a step of forward loads the next one's inputs: before its products (0), between them and the step (1), or
    after the step (2), from where the assembler moves the loads among the products. saves: for backward.

    Measured or predicted, see benchmarks/NOTES.md. In training the step before has stored much, and loads wait behind
    stores. After the step only where nothing keeps them there (another exchange through shared memory), and the step
    is longer than they take.
    """
    few = plan.num_warps <= 4
    if not cell.operands or cell.published or itemsize == 8:
        return 0
    if not saves:
        return int(few and cell.states > 1)
    if itemsize == 4:
        return 0
    return 2 if few and cell.level == len(cell.operands) and cell.gates > 1 and not cell.means else 1


@triton.jit(do_not_specialize=["T", "B"])
def forward_kernel(
    gx_ptr, u_ptr, bias_ptr, params_ptr, dropout_ptr, y_ptr, c_ptr, saved_ptr, mask_ptr, hn_ptr, cn_ptr,
    w_ptr, b_ptr, between_ptr, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, GATES: tl.constexpr, LEVEL: tl.constexpr, STATE_OF: tl.constexpr, ADDS: tl.constexpr,
    LATE: tl.constexpr, PUBLISHED: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr, PARAMS: tl.constexpr,
    PACK: tl.constexpr, SAVE: tl.constexpr, STEP: tl.constexpr, OPERANDS_1: tl.constexpr, OPERANDS_2: tl.constexpr,
    PADDING: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, WARPS: tl.constexpr,
    U_IN_REGISTERS: tl.constexpr, DRAWN: tl.constexpr, LOADS: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """LOADS: see `loads`; in a stack -1, and inputs are loaded two steps ahead, behind the step. LAYERS, w_ptr, b_ptr,
    between_ptr: see `stack`; without a stack 1 and None."""
    W: tl.constexpr = WARPS if WARPS * 16 < BLOCK_H else BLOCK_H // 16
    units = unit_order(BLOCK_H, W)
    r = tl.arange(0, BLOCK_B)
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_B
    valid = r < B - row0
    # A load past the batch reads its last row instead (rows do not mix, and that one is not stored), and one past H the
    # last unit: no predicates.
    rows = memory_rows(BLOCK_B)
    row_mask = rows < B - row0
    from_rows = tl.minimum(rows, B - 1 - row0).to(tl.int32)
    tile_units = memory_units(H, BLOCK_H, W, y_ptr.dtype.element_ty.primitive_bitwidth // 8)
    from_units = readable(tile_units, H)
    mask = (tile_units < H) & row_mask
    group = tl.program_id(1).to(tl.int64)
    waits = False
    # Offsets inside a step are small; the step's start is a 64-bit scalar that advances.
    at_h = rows * (GROUPS * H) + tile_units
    from_h = from_rows * (GROUPS * H) + from_units
    from_g = from_rows * (GROUPS * G * H) + from_units
    C: tl.constexpr = STATES - 1
    at_c = rows * (GROUPS * C * H) + tile_units
    from_c = from_rows * (GROUPS * C * H) + from_units
    at_state = rows * H + tile_units
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    AHEAD: tl.constexpr = 1 if LAYERS == 1 else 2
    PRODUCTS: tl.constexpr = len(ADDS)
    OPERANDS: tl.constexpr = len(GATES)
    SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
    WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
    word_units = memory_units(H, BLOCK_H, W, TYPE.primitive_bitwidth // 8 * SAVED_PACK)
    word_mask = (word_units < H) & row_mask
    at_s = rows * (GROUPS * WORDS * H) + word_units
    line = (row0 * GROUPS + group) * H
    state0 = (group * B + row0) * H
    step, sign = nth_step(group, 0, T, REVERSED)
    per_step = B.to(tl.int64) * (GROUPS * H)
    if LAYERS > 1:
        # Layer n is program 2 n of its rows (axis 2); program 2 n - 1 makes its input of the layer below.
        layer = (tl.program_id(2).to(tl.int64) + 1) // 2
        state0 += layer * B * H
        y_ptr += layer * (T + 1) * per_step
        gx_ptr = tl.where(layer > 0, between_ptr + (layer - 1) * T * per_step * G, gx_ptr)
        if tl.program_id(2) % 2 == 1:
            if b_ptr is not None:
                b_ptr += (layer - 1) * (G * H)
            w_ptr += (layer - 1) * (G * H * H)
            project(
                y_ptr - T * per_step, w_ptr, b_ptr, gx_ptr, T, B, row0, per_step, H, BLOCK_H, BLOCK_B, ACC, G, False,
                PRECISION, FAST, W, U_IN_REGISTERS,
            )  # fmt: skip
            return
        c_ptr += layer * ((T + 1) * SAVE + (not SAVE)) * per_step * C
        saved_ptr += layer * T * per_step * WORDS
        u_ptr += layer * (PRODUCTS * H * H)
        if bias_ptr is not None:
            bias_ptr += layer * (apart_before(ADDS, PRODUCTS) * H)
        if PARAMS > 0:
            params_ptr += layer * (PARAMS * H)
        waits = layer > 0
        from_g, _, _ = places(H, BLOCK_H, BLOCK_B, W, B, row0, G * H, TYPE)
        _, at_words, in_words = places(H, BLOCK_H, BLOCK_B, W, B, row0, H, TYPE)
    begin = step * per_step + line
    advance = sign * per_step
    gx_ptr += begin * G
    y_ptr += begin + per_step - advance  # row step+1 is after the step, and the row it started from is before it
    u_ptr += group * (PRODUCTS * H * H)
    if bias_ptr is not None:
        bias_ptr += group * (apart_before(ADDS, PRODUCTS) * H)

    if U_IN_REGISTERS:
        U = load_weights(u_ptr, PRODUCTS, H, BLOCK_H, W, False)
    else:
        square = units[:, None] * H + units[None, :]
        U = load_tiles(u_ptr, square, (units[:, None] < H) & (units[None, :] < H), PRODUCTS, H * H, TYPE)
    U = operands(U, PRODUCTS, TYPE, PRECISION)
    start = biases(bias_ptr, units, tl.zeros([BLOCK_H, BLOCK_B], ACC), ADDS, H)
    fixed = ()
    if PARAMS > 0:
        fixed = load_params(params_ptr + group * (PARAMS * H), units, PARAMS, H, ACC)
    share = shares(units, H, ACC)

    states = read_tiles(y_ptr, from_h, 1, 0)
    if STATES > 1:
        c_ptr += line * C
        if SAVE:
            c_ptr += (step * per_step + per_step - advance) * C
        states = states + read_tiles(c_ptr, from_c, C, H)
    states = cast_tiles(states, STATES, ACC)
    element = in_layout_of(states[0], (r * (GROUPS * H))[None, :] + units[:, None])
    fixed = fixed + draw(dropout_ptr, element + line, DRAWN, True, ACC)
    if SAVED > 0:
        saved_ptr += begin * WORDS
    if LAYERS > 1:
        there = complete_input(load_input(gx_ptr, from_g, G, H), gx_ptr, from_g, G, H, waits)
        gx_ptr += tl.where(T > 1, advance * G, 0)
        loaded = load_input(gx_ptr, from_g, G, H)
    else:
        loaded = load_next(gx_ptr, from_g, G, H)
    code = valid
    if mask_ptr is not None:
        mask_ptr += step * B.to(tl.int64) + row0
        code = load_mask(mask_ptr, r, valid, group, REVERSED, PADDING)

    for t in range(T):
        # The next step's inputs are loaded once this step's are taken apart, and nothing uses them before the next step
        # (see `load_next`). The last step loads its own inputs again.
        here = gx_ptr
        gx_ptr += tl.where(t + AHEAD < T, advance * G, 0)
        gx = ()
        if LAYERS > 1:
            gx = arrived(there, G, TYPE, ACC)
        if LOADS == 0:
            gx = arrived(loaded, G, TYPE, ACC)
            loaded = load_next(gx_ptr, from_g, G, H)
        if mask_ptr is not None:
            mask_ptr += sign * B
            code_next = load_mask(mask_ptr, r, tl.where(t + 1 < T, valid, False), group, REVERSED, PADDING)
            states = keep_rows(states, not_reset(code, PADDING), STATES)
        params = fixed + draw(dropout_ptr, element + (line + (step + sign * t) * per_step), DRAWN, False, ACC) + share
        hu = ()
        if OPERANDS > 0:
            v = states
            if PUBLISHED:
                v = OPERANDS_1(gx, states, params, FAST)
            for n in tl.static_range(LEVEL):
                x = inside(v[n], units, H, TYPE, FAST)
                hu = hu + products(U, x, start, first_product(GATES, n), first_product(GATES, n + 1), PRECISION)
            if LOADS > 0:
                gx = arrived(loaded, G, TYPE, ACC)
            if LOADS == 1:
                loaded = load_next(gx_ptr, from_g, G, H)
            if LEVEL < OPERANDS:
                m = OPERANDS_2(gx, hu, states, params, FAST)
                for n in tl.static_range(LEVEL, OPERANDS):
                    x = inside(m[n - LEVEL], units, H, TYPE, FAST)
                    hu = hu + products(U, x, start, first_product(GATES, n), first_product(GATES, n + 1), PRECISION)
        new, saved = STEP(gx, hu, states, params, FAST)
        if LOADS == 2:
            loaded = load_next(gx_ptr, from_g, G, H)
        states, stored = after_step(new, states, code, group, STATES, REVERSED, PADDING)
        y_ptr += advance
        if LAYERS > 1:
            store_words(word_ptr(y_ptr), at_words, in_words, stored, 1, 0, TYPE)
            there = complete_input(loaded, here, from_g, G, H, waits)
            loaded = load_input(gx_ptr, from_g, G, H)
        else:
            write_tiles(y_ptr, at_h, mask, stored, 0, 1, 0)
        if SAVE and STATES > 1:
            c_ptr += advance * C
            write_tiles(c_ptr, at_c, mask, stored, 1, STATES, H)
        if SAVED > 0:
            words = pack_tiles(saved, SAVED, SAVED_PACK, TYPE)
            write_tiles(saved_ptr, at_s, word_mask, words, 0, WORDS, H)
            saved_ptr += advance * WORDS
        if mask_ptr is not None:
            code = code_next

    write_tiles(hn_ptr + state0, at_state, mask, states, 0, 1, 0)
    if STATES > 1:
        write_tiles(cn_ptr + state0 * C, rows * (C * H) + tile_units, mask, states, 1, STATES, H)
