"""Schedule `stepwise`: one launch a step, and forward one more where the operands of level 1 have to be published, and
one more for those of level 2; U streamed from L2; any H, any B.

Each program owns BLOCK_H units of BLOCK_B rows. A launch orders the steps, so no program waits for another. A cell that
takes means over units (WHOLE) needs all units of a row in one program: then the products are launches of their own
(`streamed`), before those here, which find their results.
Shapes as in `resident`, and per-launch scratch in the accumulation type:
    sh, sc    [K, B, H], [K, B, (S-1)*H]  the first state and the others in full precision, in place: a program reads
              and writes its own tile only, with a barrier between (the compiler may load and store a tile in different
              register layouts, so that one warp would overwrite what another has not read yet)
    hu_first  [K, B, .*H]  recurrent products of level 1, from PHASE 1 to PHASE 2; WHOLE: all, without their biases
    dv        [K, B, .*H]  WHOLE: the gradients of the operands
    dsh, dsc  gradients of the states, without what step t+1 still has to send through U; in place likewise, as dparams
and in the data's type:
    v         [., B, K, .*H] (of the first axis only the first is used)  the operands of level 1, where published
    m         [B, K, .*H]  the operands of level 2
t counts the steps as the group takes them: a reversed group's first is the last in memory.
For TF32 products U is rounded before, and forward the step before leaves h rounded in a buffer of its own, h [B, K, H];
otherwise h is None, and y is read. (Rounded where they stream, U and h would double what a launch issues.)
"""

import triton
import triton.language as tl

from .exchange import shares
from .math import operand
from .random import draw_all
from .streamed import stream, through
from .tiles import (
    active,
    add_outer,
    add_params,
    after_step,
    apart_before,
    before_step,
    biases,
    computed_before,
    finish_step,
    first_product,
    is_in,
    keep_rows,
    load_mask,
    load_params,
    load_tiles,
    not_reset,
    nth_step,
    operands,
    others_are_operands,
    pack_tiles,
    replace_tile,
    store_tiles,
    unpack_tiles,
    zeros,
)


@triton.jit(do_not_specialize=["t", "T", "B"])
def forward_kernel(
    gx_ptr, u_ptr, bias_ptr, params_ptr, dropout_ptr, y_ptr, c_ptr, saved_ptr, mask_ptr, sh_ptr, sc_ptr, v_ptr,
    hu_first_ptr, m_ptr, h_ptr, h_after_ptr, t, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, GATES: tl.constexpr, LEVEL: tl.constexpr, STATE_OF: tl.constexpr, ADDS: tl.constexpr,
    LATE: tl.constexpr, PUBLISHED: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr, PARAMS: tl.constexpr,
    PACK: tl.constexpr, SAVE: tl.constexpr, STEP: tl.constexpr, OPERANDS_1: tl.constexpr, OPERANDS_2: tl.constexpr,
    PADDING: tl.constexpr, PHASE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr,
    DRAWN: tl.constexpr,
):  # fmt: skip
    """Step t. PHASE 0: the operands of level 1. PHASE 1: their products, and the step if there is no level 2; else the
    operands of level 2. PHASE 2: their products, and the step."""
    unit0 = tl.program_id(0) * BLOCK_H
    units = unit0 + tl.arange(0, BLOCK_H)
    row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_mask = row < B
    mask = (units[:, None] < H) & row_mask[None, :]
    group = tl.program_id(2).to(tl.int64)
    step, sign = nth_step(group, t, T, REVERSED)
    steps_before = step.to(tl.int64) * B
    line = row * GROUPS + group
    per_step = B.to(tl.int64) * (GROUPS * H)
    at_h = (line * H)[None, :] + units[:, None]
    at_g = (line * (G * H))[None, :] + units[:, None]
    in_group = group * B + row
    at_state = (in_group * H)[None, :] + units[:, None]
    C: tl.constexpr = STATES - 1
    at_others = (in_group * (C * H))[None, :] + units[:, None]
    PRODUCTS: tl.constexpr = len(ADDS)
    OPERANDS: tl.constexpr = len(GATES)
    FIRST: tl.constexpr = first_product(GATES, LEVEL)  # products of level 1
    M: tl.constexpr = OPERANDS - LEVEL
    gx_ptr += step * per_step * G
    y_ptr += (step + 1) * per_step  # after the step
    u_ptr += group * (PRODUCTS * H * H)
    if bias_ptr is not None:
        bias_ptr += group * (apart_before(ADDS, PRODUCTS) * H)

    code = row_mask
    states = load_tiles(sh_ptr, at_state, mask, 1, 0, ACC)
    if STATES > 1:
        states = states + load_tiles(sc_ptr, at_others, mask, C, H, ACC)
    if mask_ptr is not None:
        code = load_mask(mask_ptr + steps_before, row, row_mask, group, REVERSED, PADDING)
        states = keep_rows(states, not_reset(code, PADDING), STATES)
    gx = load_tiles(gx_ptr, at_g, mask, G, H, ACC)
    params = ()
    if PARAMS > 0:
        params = load_params(params_ptr + group * (PARAMS * H), units, PARAMS, H, ACC)
    share = shares(units, H, ACC)
    start = biases(bias_ptr, units, tl.zeros([BLOCK_H, BLOCK_B], ACC), ADDS, H)
    at_hu = (in_group * ((PRODUCTS if WHOLE else FIRST) * H))[None, :] + units[:, None]
    hu = ()
    if PHASE > 0 and WHOLE:
        THERE: tl.constexpr = FIRST if PHASE == 1 else PRODUCTS
        sums = load_tiles(hu_first_ptr, at_hu, mask, THERE, H, ACC)
        for n in tl.static_range(THERE):
            hu = hu + (sums[n] + start[n],)
    elif PHASE == 1 and PUBLISHED:
        for j in tl.static_range(LEVEL):
            sums = stream(
                u_ptr, unit0, v_ptr + j * H, LEVEL, line, row_mask, row_mask, H,
                first_product(GATES, j), first_product(GATES, j + 1),
                BLOCK_H, BLOCK_B, BLOCK_K, ACC, False, PRECISION,
            )  # fmt: skip
            for n in tl.static_range(len(sums)):
                hu = hu + (sums[n] + start[first_product(GATES, j) + n],)
    elif PHASE == 1 and LEVEL > 0:
        if h_ptr is None:
            h_ptr = y_ptr - sign * per_step
        sums = stream(
            u_ptr, unit0, h_ptr, 1, line, row_mask, not_reset(code, PADDING), H, 0, FIRST,
            BLOCK_H, BLOCK_B, BLOCK_K, ACC, mask_ptr is not None, PRECISION,
        )  # fmt: skip
        for n in tl.static_range(FIRST):
            hu = hu + (sums[n] + start[n],)
    elif PHASE == 2:
        second = ()
        for j in tl.static_range(M):
            second = second + stream(
                u_ptr, unit0, m_ptr + j * H, M, line, row_mask, row_mask, H,
                first_product(GATES, LEVEL + j), first_product(GATES, LEVEL + j + 1),
                BLOCK_H, BLOCK_B, BLOCK_K, ACC, False, PRECISION,
            )  # fmt: skip
        hu = load_tiles(hu_first_ptr, at_hu, mask, FIRST, H, ACC)
        for n in tl.static_range(PRODUCTS - FIRST):
            hu = hu + (second[n] + start[FIRST + n],)

    # After the products, which leave no registers for them.
    params = params + draw_all(dropout_ptr, at_h, step * per_step, DRAWN, ACC) + share
    if PHASE == 0:
        v = operands(OPERANDS_1(gx, states, params, FAST), LEVEL, v_ptr.dtype.element_ty, PRECISION)
        store_tiles(v_ptr, (line * (LEVEL * H))[None, :] + units[:, None], mask, v, 0, LEVEL, H)
    elif PHASE == 1 and M > 0:
        if not WHOLE:
            store_tiles(hu_first_ptr, at_hu, mask, hu, 0, FIRST, H)
        m = operands(OPERANDS_2(gx, hu, states, params, FAST), M, m_ptr.dtype.element_ty, PRECISION)
        store_tiles(m_ptr, (line * (M * H))[None, :] + units[:, None], mask, m, 0, M, H)
    else:
        new, saved = STEP(gx, hu, states, params, FAST)
        states, stored = after_step(new, states, code, group, STATES, REVERSED, PADDING)
        tl.debug_barrier()  # sh and sc are in place
        store_tiles(sh_ptr, at_state, mask, states, 0, 1, 0)
        store_tiles(y_ptr, at_h, mask, stored, 0, 1, 0)
        if h_after_ptr is not None:
            tl.store(h_after_ptr + at_h, operand(states[0], h_after_ptr.dtype.element_ty, PRECISION), mask=mask)
        if STATES > 1:
            store_tiles(sc_ptr, at_others, mask, states, 1, STATES, H)
        if SAVE and STATES > 1:
            at_c = (line * (C * H))[None, :] + units[:, None]
            store_tiles(c_ptr + (step + 1) * per_step * C, at_c, mask, stored, 1, STATES, H)
        if SAVED > 0:
            SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
            WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
            at_s = (line * (WORDS * H))[None, :] + units[:, None]
            words = pack_tiles(saved, SAVED, SAVED_PACK, y_ptr.dtype.element_ty)
            store_tiles(saved_ptr + step * per_step * WORDS, at_s, mask, words, 0, WORDS, H)


@triton.jit
def _load_states(
    y_ptr, c_ptr, at_h, at_c, mask, at, STATES: tl.constexpr, H: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The states in the row that starts at element `at` of y."""
    states = load_tiles(y_ptr + at, at_h, mask, 1, 0, ACC)
    if STATES > 1:
        states = states + load_tiles(c_ptr + at * (STATES - 1), at_c, mask, STATES - 1, H, ACC)
    return states


@triton.jit
def _load_saved(
    saved_ptr, line, units, mask, at, SAVED: tl.constexpr, PACK: tl.constexpr, H: tl.constexpr, TYPE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The saved tiles of the step whose row starts at element `at` of y."""
    SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
    WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
    at_s = (line * (WORDS * H))[None, :] + units[:, None]
    words = load_tiles(saved_ptr + at * WORDS, at_s, mask, WORDS, H, saved_ptr.dtype.element_ty)
    return unpack_tiles(words, SAVED, SAVED_PACK, TYPE, ACC)


@triton.jit(do_not_specialize=["t", "T", "B"])
def backward_kernel(
    dy_ptr, dcs_ptr, u_ptr, params_ptr, dropout_ptr, y_ptr, c_ptr, saved_ptr, mask_ptr, dgx_ptr, dhu_ptr, m_ptr,
    dparams_ptr, dsh_ptr, dsc_ptr, dv_ptr, t, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, GATES: tl.constexpr, LEVEL: tl.constexpr, STATE_OF: tl.constexpr, ADDS: tl.constexpr,
    LATE: tl.constexpr, PUBLISHED: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr, PARAMS: tl.constexpr,
    SEGMENTS: tl.constexpr, PACK: tl.constexpr, STEP: tl.constexpr, BACKWARD_2: tl.constexpr, FINISH: tl.constexpr,
    PADDING: tl.constexpr, PHASE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, DRAWN: tl.constexpr,
):  # fmt: skip
    """Step t. PHASE 0, only with level 2: backward_2. PHASE 1: the step. The first of them starts with the rest of
    step t+1: its gradients through U^T and `finish` (not if FIRST, when there is no such step). LAST (t = -1) is that
    rest alone, for dh0 and dc0."""
    unit0 = tl.program_id(0) * BLOCK_H
    units = unit0 + tl.arange(0, BLOCK_H)
    row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_mask = row < B
    mask = (units[:, None] < H) & row_mask[None, :]
    group = tl.program_id(2).to(tl.int64)
    step, sign = nth_step(group, t, T, REVERSED)
    steps_before = step.to(tl.int64) * B
    line = row * GROUPS + group
    per_step = B.to(tl.int64) * (GROUPS * H)
    advance = sign * per_step
    PRODUCTS: tl.constexpr = len(ADDS)
    OPERANDS: tl.constexpr = len(GATES)
    FIRST_PRODUCTS: tl.constexpr = first_product(GATES, LEVEL)
    APART: tl.constexpr = apart_before(ADDS, PRODUCTS)
    COMPUTED: tl.constexpr = computed_before(STATE_OF, LEVEL)
    STORED: tl.constexpr = COMPUTED + OPERANDS - LEVEL
    C: tl.constexpr = STATES - 1
    BEGINS: tl.constexpr = (LEVEL == OPERANDS) == (PHASE == 1)
    # Whether step t+1 has something left for the other states, too.
    MORE: tl.constexpr = FINISH is not None or others_are_operands(STATE_OF)
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    at_h = (line * H)[None, :] + units[:, None]
    at_c = (line * (C * H))[None, :] + units[:, None]
    at_g = (line * (G * H))[None, :] + units[:, None]
    at_i = (line * (APART * H))[None, :] + units[:, None]
    at_m = (line * (STORED * H))[None, :] + units[:, None]
    at_state = ((group * B + row) * H)[None, :] + units[:, None]
    at_others = ((group * B + row) * (C * H))[None, :] + units[:, None]
    at_dv = ((group * B + row) * (OPERANDS * H))[None, :] + units[:, None]
    dgx_ptr += step * per_step * G
    if APART > 0:
        dhu_ptr += step * per_step * APART
    if STORED > 0:
        m_ptr += step * per_step * STORED
    u_ptr += group * (PRODUCTS * H * H)
    params = ()
    if PARAMS > 0:
        params = load_params(params_ptr + group * (PARAMS * H), units, PARAMS, H, ACC)
        dparams_ptr += (tl.program_id(1).to(tl.int64) * GROUPS + group) * (PARAMS * H)
    share = shares(units, H, ACC)
    sums = zeros(PARAMS, BLOCK_H, BLOCK_B, ACC)

    dstates = load_tiles(dsh_ptr, at_state, mask, 1, 0, ACC)
    if STATES > 1 and (MORE or not LAST):
        dstates = dstates + load_tiles(dsc_ptr, at_others, mask, C, H, ACC)
    if BEGINS and not FIRST:
        dv = ()
        for n in tl.static_range(LEVEL):
            d = tl.zeros([BLOCK_H, BLOCK_B], ACC) if STATE_OF[n] < 0 else dstates[STATE_OF[n]]
            if dv_ptr is None:
                d = through(
                    d, n, SEGMENTS, u_ptr, dgx_ptr + advance * G, dhu_ptr + advance * APART if APART > 0 else dhu_ptr,
                    G * H, APART * H, units, line, row_mask, H, BLOCK_K, PRECISION,
                )  # fmt: skip
            else:
                d = d + tl.load(dv_ptr + at_dv + n * H, mask=mask, other=0.0)
            if STATE_OF[n] >= 0:
                dstates = replace_tile(dstates, STATE_OF[n], d)
            else:
                dv = dv + (d,)
        code_after = row_mask
        if mask_ptr is not None:
            code_after = load_mask(mask_ptr + steps_before + sign * B, row, row_mask, group, REVERSED, PADDING)
        if FINISH is not None:
            # y's row step+1 is after step t for groups that go forward, and before step t+1 for all groups.
            at = (step + sign) * per_step
            next_after = _load_states(y_ptr, c_ptr, at_h, at_c, mask, at + per_step, STATES, H, ACC)
            next_before = _load_states(y_ptr, c_ptr, at_h, at_c, mask, at + per_step - advance, STATES, H, ACC)
            if mask_ptr is not None:
                next_before = keep_rows(next_before, not_reset(code_after, PADDING), STATES)
            next_saved = _load_saved(saved_ptr, line, units, mask, at, SAVED, PACK, H, TYPE, ACC)
            next_dgx = load_tiles(dgx_ptr + advance * G, at_g, mask, G, H, ACC)
            nothing = zeros(PARAMS, BLOCK_H, BLOCK_B, ACC)
            next_params = params + draw_all(dropout_ptr, at_h, at, DRAWN, ACC) + share
            next_dgx, dstates, dparams = finish_step(
                FINISH, next_dgx, dstates, nothing, dv, next_saved, next_before, next_after, next_params, code_after,
                FAST, PADDING,
            )  # fmt: skip
            if PARAMS > 0:
                sums = add_params(sums, dparams, row_mask, code_after, PADDING)
            tl.debug_barrier()  # dgx is in place
            for n in tl.static_range(len(LATE)):
                store_tiles(dgx_ptr + advance * G + LATE[n] * H, at_g, mask, next_dgx, LATE[n], LATE[n] + 1, H)
        if mask_ptr is not None:
            if MORE:
                dstates = keep_rows(dstates, not_reset(code_after, PADDING), STATES)
            else:  # the others' are selected already
                (dh,) = keep_rows(dstates, not_reset(code_after, PADDING), 1)
                dstates = replace_tile(dstates, 0, dh)

    if LAST:
        tl.debug_barrier()  # dsh and dsc are in place
        store_tiles(dsh_ptr, at_state, mask, dstates, 0, 1, 0)
        if STATES > 1 and MORE:
            store_tiles(dsc_ptr, at_others, mask, dstates, 1, STATES, H)
    else:
        dy = ()
        dcs = ()
        if BEGINS and dy_ptr is not None:  # else it is in dsh already
            dy = load_tiles(dy_ptr + step * per_step, at_h, mask, 1, 0, ACC)
        if BEGINS and dcs_ptr is not None:
            dcs = load_tiles(dcs_ptr + step * per_step * C, at_c, mask, C, H, ACC)
        after_row = (step + 1) * per_step
        before_row = after_row - advance
        after = _load_states(y_ptr, c_ptr, at_h, at_c, mask, after_row, STATES, H, ACC)
        before = _load_states(y_ptr, c_ptr, at_h, at_c, mask, before_row, STATES, H, ACC)
        saved = ()
        if SAVED > 0:
            saved = _load_saved(saved_ptr, line, units, mask, step * per_step, SAVED, PACK, H, TYPE, ACC)
        code = row_mask
        if mask_ptr is not None:
            code = load_mask(mask_ptr + steps_before, row, row_mask, group, REVERSED, PADDING)
            before = keep_rows(before, not_reset(code, PADDING), STATES)
        dstates = add_outer(dstates, dy, dcs, code, PADDING)

        if PHASE == 0:
            params = params + draw_all(dropout_ptr, at_h, step * per_step, DRAWN, ACC) + share
            d_second, m = BACKWARD_2(dstates, saved, before, after, params, FAST)
            if PADDING:
                d_second = keep_rows(d_second, active(code), PRODUCTS - FIRST_PRODUCTS)
                m = keep_rows(m, active(code), OPERANDS - LEVEL)
            tl.debug_barrier()  # dsh and dsc are in place
            store_tiles(m_ptr + COMPUTED * H, at_m, mask, m, 0, OPERANDS - LEVEL, H)
            for n in tl.static_range(FIRST_PRODUCTS, PRODUCTS):
                d = (d_second[n - FIRST_PRODUCTS],)
                if ADDS[n] < 0:
                    store_tiles(dhu_ptr + apart_before(ADDS, n) * H, at_i, mask, d, 0, 1, H)
                else:
                    store_tiles(dgx_ptr + ADDS[n] * H, at_g, mask, d, 0, 1, H)
            store_tiles(dsh_ptr, at_state, mask, dstates, 0, 1, 0)
            if STATES > 1:
                store_tiles(dsc_ptr, at_others, mask, dstates, 1, STATES, H)
        else:
            dm = ()
            for n in tl.static_range(LEVEL, OPERANDS):
                if dv_ptr is None:
                    d = through(
                        tl.zeros([BLOCK_H, BLOCK_B], ACC), n, SEGMENTS, u_ptr, dgx_ptr, dhu_ptr, G * H, APART * H,
                        units, line, row_mask, H, BLOCK_K, PRECISION,
                    )  # fmt: skip
                else:
                    d = tl.load(dv_ptr + at_dv + n * H, mask=mask, other=0.0)
                dm = dm + (d,)
            params = params + draw_all(dropout_ptr, at_h, step * per_step, DRAWN, ACC) + share
            dgx, dhu, new, dparams, computed = STEP(dstates, dm, saved, before, after, params, FAST)
            dgx, dhu, dstates, computed = before_step(dgx, dhu, new, computed, dstates, code, PADDING)
            if PARAMS > 0:
                sums = add_params(sums, dparams, row_mask, code, PADDING)
            tl.debug_barrier()  # dsh and dsc are in place
            # Other programs of this launch read what PHASE 0 wrote for level 2: only the rest is stored.
            for n in tl.static_range(G):
                if not is_in(n, ADDS, FIRST_PRODUCTS):
                    store_tiles(dgx_ptr + n * H, at_g, mask, dgx, n, n + 1, H)
            for n in tl.static_range(FIRST_PRODUCTS):
                if ADDS[n] < 0:
                    store_tiles(dhu_ptr + apart_before(ADDS, n) * H, at_i, mask, dhu, n, n + 1, H)
            if COMPUTED > 0:
                store_tiles(m_ptr, at_m, mask, computed, 0, COMPUTED, H)
            store_tiles(dsh_ptr, at_state, mask, dstates, 0, 1, 0)
            if STATES > 1:
                if mask_ptr is not None and not MORE:
                    dstates = keep_rows(dstates, not_reset(code, PADDING), STATES)
                store_tiles(dsc_ptr, at_others, mask, dstates, 1, STATES, H)

    if PARAMS > 0 and (FINISH is not None or not LAST):
        total = ()
        for n in tl.static_range(PARAMS):
            before_sum = tl.load(dparams_ptr + n * H + units, mask=units < H, other=0.0)
            total = total + (before_sum + tl.sum(sums[n], 1),)
        tl.debug_barrier()  # dparams is in place
        for n in tl.static_range(PARAMS):
            tl.store(dparams_ptr + n * H + units, total[n], mask=units < H)
