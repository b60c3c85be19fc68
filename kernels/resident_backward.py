"""Backward of `resident`, whose docstring has the shapes. It takes the steps in the opposite order."""

import triton
import triton.language as tl

from .between import complete_words, load_words, places, project, store_words, word_ptr
from .exchange import shares
from .layout import (
    arrived,
    in_layout_of,
    load_weights,
    memory_rows,
    memory_units,
    read_tiles,
    readable,
    unit_order,
    write_tiles,
)
from .math import is_one_chain, new_chain
from .random import draw
from .tiles import (
    active,
    add_outer,
    add_params,
    apart_before,
    before_step,
    cast_tiles,
    computed_before,
    finish_step,
    first_product,
    inside_all,
    is_in,
    keep_rows,
    load_mask,
    load_params,
    load_tiles,
    not_reset,
    nth_step,
    operands,
    replace_tile,
    sum_products,
    unpack_tiles,
    zero_sums,
    zeros,
)


@triton.jit
def _load_step(
    dy_ptr, dcs_ptr, y_ptr, c_ptr, saved_ptr, from_h, from_c, from_s,
    H: tl.constexpr, STATES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """What a step of backward reads: the states before it, saved words, and dy and dcs (if any).

    What the cell does not use, such as the LSTM's h, is not loaded: the compiler drops the load.
    """
    before = read_tiles(y_ptr, from_h, 1, 0)
    if STATES > 1:
        before = before + read_tiles(c_ptr, from_c, STATES - 1, H)
    dy = ()
    if dy_ptr is not None:
        dy = read_tiles(dy_ptr, from_h, 1, 0)
    dcs = ()
    if dcs_ptr is not None:
        dcs = read_tiles(dcs_ptr, from_c, STATES - 1, H)
    return before, read_tiles(saved_ptr, from_s, WORDS, H), dy, dcs


@triton.jit
def _store_dgx(ptr, at_g, g_mask, tile, LAYERS: tl.constexpr):
    """A tile of dgx. at_g, g_mask: in a stack, of words."""
    if LAYERS > 1:
        store_words(word_ptr(ptr), at_g, g_mask, (tile,), 1, 0, ptr.dtype.element_ty)
    else:
        write_tiles(ptr, at_g, g_mask, (tile,), 0, 1, 0)


@triton.jit
def _store_step(
    dgx_ptr, dhu_ptr, m_ptr, at_g, at_i, at_m, g_mask, mask, dgx, dhu, computed, ADDS: tl.constexpr,
    LATE: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """What a step of backward stores of dgx, dhu and m, but for the tiles of dgx that are late."""
    for n in tl.static_range(len(dgx)):
        if not is_in(n, LATE):
            _store_dgx(dgx_ptr + n * H, at_g, g_mask, dgx[n], LAYERS)
    for n in tl.static_range(len(ADDS)):
        if ADDS[n] < 0:
            write_tiles(dhu_ptr + apart_before(ADDS, n) * H, at_i, mask, dhu, n, n + 1, H)
    if len(computed) > 0:
        write_tiles(m_ptr, at_m, mask, computed, 0, len(computed), H)


@triton.jit(do_not_specialize=["T", "B"])
def backward_kernel(
    dy_ptr, dcs_ptr, dhn_ptr, dcn_ptr, u_ptr, params_ptr, dropout_ptr, y_ptr, c_ptr, saved_ptr, mask_ptr,
    dgx_ptr, dhu_ptr, m_ptr, dparams_ptr, dh0_ptr, dc0_ptr, w_ptr, between_ptr, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, GATES: tl.constexpr, LEVEL: tl.constexpr, STATE_OF: tl.constexpr, ADDS: tl.constexpr,
    LATE: tl.constexpr, PUBLISHED: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr, PARAMS: tl.constexpr,
    PACK: tl.constexpr, STEP: tl.constexpr, BACKWARD_2: tl.constexpr, FINISH: tl.constexpr, PADDING: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, WARPS: tl.constexpr, U_IN_REGISTERS: tl.constexpr,
    DRAWN: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """LAYERS, w_ptr, between_ptr: see `stack`; without a stack 1 and None."""
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
    from_h = from_rows * (GROUPS * H) + from_units
    at_g = rows * (GROUPS * G * H) + tile_units
    from_state = from_rows * H + from_units
    C: tl.constexpr = STATES - 1
    from_c = from_rows * (GROUPS * C * H) + from_units
    PRODUCTS: tl.constexpr = len(ADDS)
    OPERANDS: tl.constexpr = len(GATES)
    FIRST: tl.constexpr = first_product(GATES, LEVEL)  # products of level 1
    APART: tl.constexpr = apart_before(ADDS, PRODUCTS)
    COMPUTED: tl.constexpr = computed_before(STATE_OF, LEVEL)  # operands of level 1 that are computed
    STORED: tl.constexpr = COMPUTED + OPERANDS - LEVEL
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    # Where products are chains of their own, their operands are all read before the first: what is stored before them
    # would hold that up. (Stores and shared memory take turns. With tf32x3 there are no registers to keep it in.) So it
    # is stored before the last product, which hides it.
    ONE: tl.constexpr = FIRST < 2 or is_one_chain(BLOCK_H, BLOCK_B, TYPE, PRECISION)
    LATER: tl.constexpr = not ONE and PRECISION != "tf32x3"
    SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
    WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
    PER: tl.constexpr = 32 // TYPE.primitive_bitwidth  # elements of a word, in a stack
    word_units = memory_units(H, BLOCK_H, W, TYPE.primitive_bitwidth // 8 * SAVED_PACK)
    from_s = from_rows * (GROUPS * WORDS * H) + readable(word_units, H)
    at_i = rows * (GROUPS * APART * H) + tile_units
    at_m = rows * (GROUPS * STORED * H) + tile_units
    state0 = (group * B + row0) * H
    step, sign = nth_step(group, T - 1, T, REVERSED)
    per_step = B.to(tl.int64) * (GROUPS * H)
    share_at = tl.program_id(0).to(tl.int64) * GROUPS + group
    g_mask = mask
    waits = False
    if LAYERS > 1:
        # Layer n is program 2 (LAYERS - 1 - n) of its rows (axis 2); the one before makes its dy of the layer above.
        layer = LAYERS - 1 - (tl.program_id(2).to(tl.int64) + 1) // 2
        per_layer = T * per_step
        dgx_ptr += layer * per_layer * G
        if tl.program_id(2) % 2 == 1:
            from_ptr = dgx_ptr + (per_layer + per_layer - per_step) * G
            to_ptr = between_ptr + (layer + 1) * per_layer - per_step
            project(
                from_ptr, w_ptr + layer * (G * H * H), None, to_ptr, T, B, row0, -per_step, H, BLOCK_H, BLOCK_B, ACC, G,
                True, PRECISION, FAST, W, U_IN_REGISTERS,
            )  # fmt: skip
            return
        waits = layer < LAYERS - 1
        state0 += layer * B * H
        share_at = tl.program_id(0).to(tl.int64) * LAYERS + layer
        dy_ptr = tl.where(waits, between_ptr + layer * per_layer, dy_ptr)
        y_ptr += layer * (per_layer + per_step)
        c_ptr += layer * (per_layer + per_step) * C
        saved_ptr += layer * per_layer * WORDS
        dhu_ptr += layer * per_layer * APART
        m_ptr += layer * per_layer * STORED
        u_ptr += layer * (PRODUCTS * H * H)
        if PARAMS > 0:
            params_ptr += layer * (PARAMS * H)
        from_dy, _, _ = places(H, BLOCK_H, BLOCK_B, W, B, row0, H, TYPE)
        _, at_g, g_mask = places(H, BLOCK_H, BLOCK_B, W, B, row0, G * H, TYPE)
    begin = step * per_step + (row0 * GROUPS + group) * H
    advance = sign * per_step

    # Every pointer starts at the last step taken and moves back; y and c at the states after it.
    y_ptr += begin + per_step
    dgx_ptr += begin * G
    if dy_ptr is not None:
        dy_ptr += begin
    if dcs_ptr is not None:
        dcs_ptr += begin * C
    if STATES > 1:
        c_ptr += (begin + per_step) * C
    if SAVED > 0:
        saved_ptr += begin * WORDS
    if APART > 0:
        dhu_ptr += begin * APART
    if STORED > 0:
        m_ptr += begin * STORED
    code = valid
    if mask_ptr is not None:
        mask_ptr += step * B.to(tl.int64) + row0
        code = load_mask(mask_ptr, r, valid, group, REVERSED, PADDING)
    u_ptr += group * (PRODUCTS * H * H)

    if U_IN_REGISTERS:
        UT = load_weights(u_ptr, PRODUCTS, H, BLOCK_H, W, True)
    else:
        transposed = units[None, :] * H + units[:, None]
        UT = load_tiles(u_ptr, transposed, (units[:, None] < H) & (units[None, :] < H), PRODUCTS, H * H, TYPE)
    UT = operands(UT, PRODUCTS, TYPE, PRECISION)
    fixed = ()
    if PARAMS > 0:
        fixed = load_params(params_ptr + group * (PARAMS * H), units, PARAMS, H, ACC)
    share = shares(units, H, ACC)
    sums = zero_sums(PARAMS, BLOCK_H, BLOCK_B, ACC)  # of the trained vectors' gradients over the steps
    zero = tl.zeros([BLOCK_H, BLOCK_B], ACC)
    dstates = (zero,)
    if dhn_ptr is not None:
        dstates = read_tiles(dhn_ptr + state0, from_state, 1, 0)
    after = read_tiles(y_ptr, from_h, 1, 0)
    y_ptr -= advance
    if STATES > 1:
        if dcn_ptr is not None:
            dstates = dstates + read_tiles(dcn_ptr + state0 * C, from_rows * (C * H) + from_units, C, H)
        else:
            dstates = dstates + zeros(C, BLOCK_H, BLOCK_B, ACC)
        after = after + read_tiles(c_ptr, from_c, C, H)
        c_ptr -= advance * C
    dstates = cast_tiles(dstates, STATES, ACC)
    after = cast_tiles(after, STATES, ACC)
    line = (row0 * GROUPS + group) * H
    element = in_layout_of(after[0], (r * (GROUPS * H))[None, :] + units[:, None])
    fixed = fixed + draw(dropout_ptr, element + line, DRAWN, True, ACC)
    if LAYERS > 1:
        dy_ptr = word_ptr(dy_ptr)
        dy_there = complete_words(load_words(dy_ptr, from_dy, 1, 0), dy_ptr, from_dy, 1, 0, waits)
        dy_ptr -= tl.where(T > 1, advance // PER, 0)
        dy_next = load_words(dy_ptr, from_dy, 1, 0)
    loaded, words, dy, dcs = _load_step(
        None if LAYERS > 1 else dy_ptr, dcs_ptr, y_ptr, c_ptr, saved_ptr, from_h, from_c, from_s, H, STATES, WORDS
    )

    for t in range(T):
        back = tl.where(t + 1 < T, advance, 0)
        y_ptr -= back
        outer = dy
        if LAYERS > 1:
            here = dy_ptr
            dy_ptr -= tl.where(t + 2 < T, advance // PER, 0)
            outer = arrived(dy_there, 1, TYPE, ACC)
            dy_after = load_words(dy_ptr, from_dy, 1, 0)
        elif dy_ptr is not None:
            dy_ptr -= back
        if dcs_ptr is not None:
            dcs_ptr -= back * C
        if STATES > 1:
            c_ptr -= back * C
        if SAVED > 0:
            saved_ptr -= back * WORDS
        loaded_next, words_next, outer_next, dcs_next = _load_step(
            None if LAYERS > 1 else dy_ptr, dcs_ptr, y_ptr, c_ptr, saved_ptr, from_h, from_c, from_s, H, STATES, WORDS
        )
        before = cast_tiles(loaded, STATES, ACC)
        saved = unpack_tiles(words, SAVED, SAVED_PACK, TYPE, ACC)
        entering = before
        if mask_ptr is not None:
            # Loaded a step ahead because of Triton, too: it gives a product's operand the width of the narrowest load
            # in the same step that it depends on, and would shuffle all of U to match.
            mask_ptr -= sign * B
            code_next = load_mask(mask_ptr, r, tl.where(t + 1 < T, valid, False), group, REVERSED, PADDING)
            entering = keep_rows(before, not_reset(code, PADDING), STATES)
        dstates = add_outer(dstates, outer, dcs, code, PADDING)
        params = fixed + draw(dropout_ptr, element + (line + (step - sign * t) * per_step), DRAWN, False, ACC) + share
        dm = ()
        if LEVEL < OPERANDS:
            d_second, m = BACKWARD_2(dstates, saved, entering, after, params, FAST)
            if PADDING:  # d_second of a row of padding is dropped by before_step
                m = keep_rows(m, active(code), OPERANDS - LEVEL)
            write_tiles(m_ptr + COMPUTED * H, at_m, mask, m, 0, OPERANDS - LEVEL, H)
            d_second = inside_all(d_second, units, PRODUCTS - FIRST, H, TYPE, FAST)
            d_second = operands(d_second, PRODUCTS - FIRST, TYPE, PRECISION)
            for n in tl.static_range(LEVEL, OPERANDS):
                d = sum_products(
                    UT, d_second, zero, zero, first_product(GATES, n), first_product(GATES, n + 1), FIRST, PRECISION
                )
                dm = dm + (d,)
        dgx, dhu, new, dparams, computed = STEP(dstates, dm, saved, entering, after, params, FAST)
        dgx, dhu, dstates, computed = before_step(dgx, dhu, new, computed, dstates, code, PADDING)
        if not LATER:
            _store_step(
                dgx_ptr, dhu_ptr, m_ptr, at_g, at_i, at_m, g_mask, mask, dgx, dhu, computed, ADDS, LATE, H, LAYERS
            )
        d_first = inside_all(dhu, units, FIRST, H, TYPE, FAST)
        d_first = operands(d_first, FIRST, TYPE, PRECISION)  # all before the first product: one barrier for them
        dv = ()
        for n in tl.static_range(LEVEL):
            d = zero
            if STATE_OF[n] >= 0:
                d = dstates[STATE_OF[n]]
            if LATER and n == LEVEL - 1:
                d = sum_products(UT, d_first, d, zero, first_product(GATES, n), FIRST - 1, 0, PRECISION)
                _store_step(
                    dgx_ptr, dhu_ptr, m_ptr, at_g, at_i, at_m, g_mask, mask, dgx, dhu, computed, ADDS, LATE, H, LAYERS
                )
                d = d + sum_products(UT, d_first, new_chain(zero), zero, FIRST - 1, FIRST, 0, PRECISION)
            else:
                d = sum_products(
                    UT, d_first, d, zero, first_product(GATES, n), first_product(GATES, n + 1), 0, PRECISION
                )
            if STATE_OF[n] >= 0:
                dstates = replace_tile(dstates, STATE_OF[n], d)
            else:
                dv = dv + (d,)
        if FINISH is not None:
            dgx, dstates, dparams = finish_step(
                FINISH, dgx, dstates, dparams, dv, saved, entering, after, params, code, FAST, PADDING
            )
            for n in tl.static_range(len(LATE)):
                _store_dgx(dgx_ptr + LATE[n] * H, at_g, g_mask, dgx[LATE[n]], LAYERS)
        if PARAMS > 0:
            sums = add_params(sums, dparams, valid, code, PADDING)
        dgx_ptr -= advance * G
        if APART > 0:
            dhu_ptr -= advance * APART
        if STORED > 0:
            m_ptr -= advance * STORED
        if mask_ptr is not None:
            dstates = keep_rows(dstates, not_reset(code, PADDING), STATES)
        after = before
        loaded = loaded_next
        words = words_next
        if LAYERS > 1:
            dy_there = complete_words(dy_next, here, from_dy, 1, 0, waits)
            dy_next = dy_after
        else:
            dy = outer_next
        dcs = dcs_next
        if mask_ptr is not None:
            code = code_next

    at_state = rows * H + tile_units
    write_tiles(dh0_ptr + state0, at_state, mask, dstates, 0, 1, 0)
    if STATES > 1:
        write_tiles(dc0_ptr + state0 * C, rows * (C * H) + tile_units, mask, dstates, 1, STATES, H)
    for n in tl.static_range(PARAMS):
        total = sums[n] if len(sums[n].shape) == 1 else tl.sum(sums[n], 1)
        tl.store(dparams_ptr + share_at * (PARAMS * H) + n * H + units, total, mask=units < H)
