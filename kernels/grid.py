"""Schedule `grid`: one launch takes every step of the sequence, with U spread over the device and a barrier a step.

Each program owns BLOCK_H hidden units with all their gates, of BLOCK_B batch rows and one group, and keeps its slices
of U on chip (see `slices`). What the others need of a step goes through global memory and L2, with a barrier before it
is read: forward the operands of level 1 through v (where that is h alone, it is in y), then those of level 2 through m;
backward the gradients of the products of level 2, then of level 1, in dgx and dhu, where they belong anyway. A cell
without a product has no barrier: its units are spread, and do not depend on each other. Means over units are exchanged
while a function runs, and some of forward's y is read without a barrier (FLAGGED); see `exchange` for both.

The barrier
-----------
The programs of one batch tile and one group share a counter, zero at launch and never reset: program p's n-th `arrive`
adds one, and `wait(n * programs)` returns once all have arrived n times.

No read is stale. Each value that is exchanged is (1) stored by some warp of the writer, (2) ordered before the
writer's release by the block barrier in `arrive` (Triton up to 3.8 puts none there itself, and a release orders only
what its own thread has seen), (3) made visible to the device by the release, which is cumulative, (4) seen by each
thread of the reader, whose acquire reads a counter that includes that release (where there is no PTX one thread polls,
and a block barrier follows), and (5) read with `.cg`, from L2, never from an older copy in the first-level cache.

No write is early. y, dgx and dhu have a row a step, and each location of them is written once a launch
(`_stored_in` says which part of a backward step stores a tile of dgx). v is rewritten two steps later (there are two,
used in turn) and forward's m one step later: in between lies another barrier, at which a program arrives when it has
read them, and after which they are written. Nothing else that is stored is read by another program.

No program waits forever. All are on the device at once, or the cooperative launch fails and none starts; between two
waits a program does finite work and then arrives; so the counter reaches every target. Launches do not share counters:
two streams, or a graph replayed, cannot see each other's. Programs of other tiles and groups are never waited for.

Without a device the interpreter runs programs one after another and a barrier would hang: PHASE then names the part
of a step between two barriers, and a launch does that part of one step only (more than once where it exchanges means).
Parts hand each other what registers would hold through `sh`, `sc` and `hu_first`; the code is the same.

Shapes are those of `resident`; scratch is that of `stepwise`, but
    v            [2, B, K, .*H]  the operands of level 1 (forward), in the data's type; of step t in v[t % 2]
    m            [B, K, .*H]     the operands of level 2 (forward)
    dparams      [batch tiles, K, P*H]  added to at the end of a launch
    counter      [groups * batch tiles] int32, zero; with means twice as many, see `exchange.spread`
    sums         [groups, batch tiles, means, programs, BLOCK_B]  in the accumulation type
"""

import triton
import triton.language as tl

from .exchange import arrive, exchanges_before, of_function, spread, store_flagged, wait
from .random import draw
from .slices import operand_products, operand_slices, segment_slices, through_u
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
    keep_rows,
    load_mask,
    load_params,
    load_tiles,
    not_reset,
    nth_step,
    pack_tiles,
    replace_tile,
    store_apart,
    store_tiles,
    unpack_tiles,
    zeros,
)


@triton.constexpr_function
def _stored_in(tile, adds, late, first_products):
    """The part of a backward step that stores a tile of dgx, once: with the second products (0), since other programs
    read those while the step stores, with the step (1), or last (2)."""
    return 0 if tile in adds[first_products:] else 2 if tile in late else 1


@triton.jit
def _load_gx(
    gx_ptr, mask_ptr, at_g, r, mask, valid, group, G: tl.constexpr, H: tl.constexpr, TYPE: tl.constexpr,
    REVERSED: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """gx of a step, in the data's type, and what the mask says of its rows."""
    loaded = load_tiles(gx_ptr, at_g, mask, G, H, TYPE)
    code = valid
    if mask_ptr is not None:
        code = load_mask(mask_ptr, r, valid, group, REVERSED, PADDING)
    return loaded, code


@triton.jit(do_not_specialize=["first", "last", "done", "T", "B"])
def forward_kernel(
    gx_ptr, u_ptr, bias_ptr, params_ptr, dropout_ptr, y_ptr, c_ptr, saved_ptr, mask_ptr, sh_ptr, sc_ptr, hu_first_ptr,
    m_ptr, v_ptr, sums_ptr, counter_ptr, first, last, done, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
    CHUNKS: tl.constexpr, ACC: tl.constexpr, G: tl.constexpr, GATES: tl.constexpr, LEVEL: tl.constexpr,
    STATE_OF: tl.constexpr, ADDS: tl.constexpr, LATE: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr,
    PARAMS: tl.constexpr, PUBLISHED: tl.constexpr, PACK: tl.constexpr, SAVE: tl.constexpr, STEP: tl.constexpr,
    OPERANDS_1: tl.constexpr, OPERANDS_2: tl.constexpr, PADDING: tl.constexpr, PHASE: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, WARPS: tl.constexpr, U_IN_REGISTERS: tl.constexpr, PTX: tl.constexpr,
    DRAWN: tl.constexpr, MEANS: tl.constexpr, FLAGGED: tl.constexpr,
):  # fmt: skip
    """Steps first..last-1. PHASE -1: all of each. 0: the operands that are published. 1: the first products, and the
    step if they are all. 2: the second products and the step. done: see `exchange`."""
    group = tl.program_id(2).to(tl.int64)
    unit0 = tl.program_id(0) * BLOCK_H
    units = unit0 + tl.arange(0, BLOCK_H)
    r = tl.arange(0, BLOCK_B)
    row0 = tl.program_id(1).to(tl.int64) * BLOCK_B
    valid = r < B - row0
    mask = (units[:, None] < H) & valid[None, :]
    OPERANDS: tl.constexpr = len(GATES)
    SECOND: tl.constexpr = OPERANDS - LEVEL
    FIRST_PRODUCTS: tl.constexpr = first_product(GATES, LEVEL)
    WAITS: tl.constexpr = PHASE == -1 and OPERANDS > 0 and FLAGGED < 2
    LAST: tl.constexpr = 2 if SECOND > 0 else 1  # the part that ends the step
    # The next step's input is loaded before a wait: for the operands of others, which needs this step's; or for y.
    EARLY: tl.constexpr = PUBLISHED or OPERANDS == 0
    of_units = spread(units, sums_ptr, counter_ptr, MEANS, H, BLOCK_H, BLOCK_B, ACC)
    if OPERANDS > 0:
        counter_ptr += group * tl.num_programs(1) + tl.program_id(1)
    target = tl.num_programs(0)
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
    WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK

    line = row0 * GROUPS + group
    in_group = group * B + row0
    # A row past the batch reads the last one's operands from the others (rows do not mix, and it is not stored).
    last_row = (B - 1 - row0).to(tl.int32)
    at_h = r[None, :] * (GROUPS * H) + units[:, None]
    at_c = r[None, :] * (GROUPS * (STATES - 1) * H) + units[:, None]
    at_g = r[None, :] * (GROUPS * G * H) + units[:, None]
    at_s = r[None, :] * (GROUPS * WORDS * H) + units[:, None]
    at_state = r[None, :] * H + units[:, None]
    step, sign = nth_step(group, first, T, REVERSED)
    per_step = B.to(tl.int64) * (GROUPS * H)
    begin = step.to(tl.int64) * per_step + line * H
    advance = sign * per_step
    gx_ptr += begin * G
    y_ptr += begin + per_step - advance  # the row before the step
    if SAVE and STATES > 1:
        c_ptr += (begin + per_step) * (STATES - 1)
    if SAVED > 0:
        saved_ptr += begin * WORDS
    sh_ptr += in_group * H
    if STATES > 1:
        sc_ptr += in_group * ((STATES - 1) * H)
    at_others = r[None, :] * ((STATES - 1) * H) + units[:, None]
    if SECOND > 0:
        m_ptr += line * (SECOND * H)
        hu_first_ptr += in_group * (FIRST_PRODUCTS * H)
    at_first = r[None, :] * (FIRST_PRODUCTS * H) + units[:, None]
    if PUBLISHED:
        v_ptr += line * (LEVEL * H)
    u_ptr += group * (len(ADDS) * H * H)
    if bias_ptr is not None:
        bias_ptr += group * (apart_before(ADDS, len(ADDS)) * H)

    U = operand_slices(u_ptr, unit0, GATES, H, BLOCK_H, BLOCK_B, CHUNKS, WARPS, U_IN_REGISTERS, PRECISION)
    start = biases(bias_ptr, units, tl.zeros([BLOCK_H, BLOCK_B], ACC), ADDS, H)
    if PARAMS > 0:
        params_ptr += group * (PARAMS * H)
    fixed = load_params(params_ptr, units, PARAMS, H, ACC)
    fixed = fixed + draw(dropout_ptr, at_h + line * H, DRAWN, True, ACC)
    states = load_tiles(sh_ptr, at_state, mask, 1, 0, ACC)
    if STATES > 1:
        states = states + load_tiles(sc_ptr, at_others, mask, STATES - 1, H, ACC)
    if mask_ptr is not None:
        mask_ptr += step.to(tl.int64) * B + row0
    loaded, code = _load_gx(gx_ptr, mask_ptr, at_g, r, mask, valid, group, G, H, TYPE, REVERSED, PADDING)

    for i in range(first, last):
        gx = pack_tiles(loaded, G, 1, ACC)
        code_now = code
        if mask_ptr is not None:
            states = keep_rows(states, not_reset(code, PADDING), STATES)
        params = fixed + draw(dropout_ptr, at_h + line * H + (step + sign * (i - first)) * per_step, DRAWN, False, ACC)
        met = done + (i - first) * exchanges_before(MEANS, 3)
        if PUBLISHED and PHASE < 1:
            at_v = r[None, :] * (GROUPS * LEVEL * H) + units[:, None]
            v_now = v_ptr + (i % 2) * (per_step * LEVEL)
            own = params + of_function(of_units, met, MEANS, 0, BLOCK_B)
            store_tiles(v_now, at_v, mask, OPERANDS_1(gx, states, own, FAST), 0, LEVEL, H)
            if WAITS:
                arrive(counter_ptr)
        if EARLY:
            gx_ptr += advance * G
            if mask_ptr is not None:
                mask_ptr += sign * B
            more = i + 1 < last
            loaded, code = _load_gx(
                gx_ptr, mask_ptr, at_g, r, tl.where(more, mask, False), tl.where(more, valid, False), group, G, H, TYPE,
                REVERSED, PADDING,
            )  # fmt: skip
        if PUBLISHED and WAITS:
            target = wait(counter_ptr, target, PTX)
        hu = ()
        if PHASE == -1 or PHASE == 1:
            if PUBLISHED:
                hu = operand_products(
                    U, v_ptr + (i % 2) * (per_step * LEVEL), last_row, None, valid, start, GROUPS * LEVEL * H, GATES, 0,
                    LEVEL, ACC, BLOCK_H, BLOCK_B, H, CHUNKS, False, WARPS, PRECISION,
                )  # fmt: skip
            else:
                hu = operand_products(
                    U, y_ptr, last_row, i > first if FLAGGED > 0 else None, not_reset(code_now, PADDING), start,
                    GROUPS * H, GATES, 0, LEVEL, ACC, BLOCK_H, BLOCK_B, H, CHUNKS, mask_ptr is not None, WARPS,
                    PRECISION,
                )  # fmt: skip
        if PHASE == 2:
            hu = load_tiles(hu_first_ptr, at_first, mask, FIRST_PRODUCTS, H, ACC)
        if SECOND > 0:
            if PHASE == -1 or PHASE == 1:
                at_m = r[None, :] * (GROUPS * SECOND * H) + units[:, None]
                own = params + of_function(of_units, met, MEANS, 1, BLOCK_B)
                store_tiles(m_ptr, at_m, mask, OPERANDS_2(gx, hu, states, own, FAST), 0, SECOND, H)
            if PHASE == 1:
                store_tiles(hu_first_ptr, at_first, mask, hu, 0, FIRST_PRODUCTS, H)
            if WAITS:
                arrive(counter_ptr)
                target = wait(counter_ptr, target, PTX)
            if PHASE == -1 or PHASE == 2:
                hu = hu + operand_products(
                    U, m_ptr, last_row, None, valid, start, GROUPS * SECOND * H, GATES, LEVEL, OPERANDS,
                    ACC, BLOCK_H, BLOCK_B, H, CHUNKS, False, WARPS, PRECISION,
                )  # fmt: skip
        if PHASE == -1 or PHASE == LAST:
            own = params + of_function(of_units, met, MEANS, 2, BLOCK_B)
            new, saved = STEP(gx, hu, states, own, FAST)
            states, stored = after_step(new, states, code_now, group, STATES, REVERSED, PADDING)
            y_ptr += advance
            if FLAGGED > 0:
                store_flagged(y_ptr, at_h, stored[0], mask)
            else:
                store_tiles(y_ptr, at_h, mask, stored, 0, 1, 0)
            if WAITS and not PUBLISHED:
                arrive(counter_ptr, FLAGGED == 1)
            # Nobody waits for the rest of the step: it comes after the arrival.
            if SAVE and STATES > 1:
                store_tiles(c_ptr, at_c, mask, stored, 1, STATES, H)
                c_ptr += advance * (STATES - 1)
            if SAVED > 0:
                store_tiles(saved_ptr, at_s, mask, pack_tiles(saved, SAVED, SAVED_PACK, TYPE), 0, WORDS, H)
                saved_ptr += advance * WORDS
            if not EARLY:
                gx_ptr += advance * G
                if mask_ptr is not None:
                    mask_ptr += sign * B
                more = i + 1 < last
                loaded, code = _load_gx(
                    gx_ptr, mask_ptr, at_g, r, tl.where(more, mask, False), tl.where(more, valid, False), group, G, H,
                    TYPE, REVERSED, PADDING,
                )  # fmt: skip
            if WAITS and not PUBLISHED:
                target = wait(counter_ptr, target, PTX, FLAGGED == 1)

    if len(MEANS) > 0 and PHASE != -1:
        mask &= done == exchanges_before(MEANS, 3 if PHASE == LAST else PHASE + 1)
    tl.debug_barrier()  # sh and sc are in place, and a launch may be less than a step
    store_tiles(sh_ptr, at_state, mask, states, 0, 1, 0)
    if STATES > 1:
        store_tiles(sc_ptr, at_others, mask, states, 1, STATES, H)


@triton.jit
def _load_step(
    dy_ptr, dcs_ptr, y_ptr, c_ptr, saved_ptr, at_h, at_c, at_s, mask,
    H: tl.constexpr, STATES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """What a step of backward reads: dy and dcs (empty if not given), the states before it, saved words."""
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    dy = ()
    if dy_ptr is not None:
        dy = load_tiles(dy_ptr, at_h, mask, 1, 0, TYPE)
    dcs = ()
    if dcs_ptr is not None:
        dcs = load_tiles(dcs_ptr, at_c, mask, STATES - 1, H, TYPE)
    before = load_tiles(y_ptr, at_h, mask, 1, 0, TYPE)
    if STATES > 1:
        before = before + load_tiles(c_ptr, at_c, mask, STATES - 1, H, TYPE)
    return dy, dcs, before, load_tiles(saved_ptr, at_s, mask, WORDS, H, saved_ptr.dtype.element_ty)


@triton.jit
def _store_gx(
    dgx_ptr, at_g, mask, dgx, PART: tl.constexpr, G: tl.constexpr, ADDS: tl.constexpr, LATE: tl.constexpr,
    FIRST_PRODUCTS: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """The tiles of dgx that this part of a step stores."""
    for n in tl.static_range(G):
        if _stored_in(n, ADDS, LATE, FIRST_PRODUCTS) == PART:
            tl.store(dgx_ptr + at_g + n * H, dgx[n].to(dgx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first", "last", "done", "T", "B"])
def backward_kernel(
    dy_ptr, dcs_ptr, u_ptr, params_ptr, dropout_ptr, y_ptr, c_ptr, saved_ptr, mask_ptr, dgx_ptr, dhu_ptr, m_ptr,
    dparams_ptr, dsh_ptr, dsc_ptr, sums_ptr, counter_ptr, first, last, done, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
    CHUNKS: tl.constexpr, ACC: tl.constexpr, G: tl.constexpr, GATES: tl.constexpr, LEVEL: tl.constexpr,
    STATE_OF: tl.constexpr, ADDS: tl.constexpr, LATE: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr,
    PARAMS: tl.constexpr, PUBLISHED: tl.constexpr, SEGMENTS: tl.constexpr, PACK: tl.constexpr, STEP: tl.constexpr,
    BACKWARD_2: tl.constexpr, FINISH: tl.constexpr, PADDING: tl.constexpr, PHASE: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, WARPS: tl.constexpr, U_IN_REGISTERS: tl.constexpr, PTX: tl.constexpr, DRAWN: tl.constexpr,
    MEANS: tl.constexpr,
):  # fmt: skip
    """Steps T-1-first..T-last, back in time. PHASE -1: all of each. 0: up to the second products. 1: the pointwise
    step. 2: its gradients through U^T, and with FINISH what follows (for which it forms the step once more). done: see
    `exchange`."""
    group = tl.program_id(2).to(tl.int64)
    unit0 = tl.program_id(0) * BLOCK_H
    units = unit0 + tl.arange(0, BLOCK_H)
    r = tl.arange(0, BLOCK_B)
    row0 = tl.program_id(1).to(tl.int64) * BLOCK_B
    valid = r < B - row0
    mask = (units[:, None] < H) & valid[None, :]
    OPERANDS: tl.constexpr = len(GATES)
    PRODUCTS: tl.constexpr = len(ADDS)
    SECOND: tl.constexpr = OPERANDS - LEVEL
    FIRST_PRODUCTS: tl.constexpr = first_product(GATES, LEVEL)
    FIRST_M: tl.constexpr = computed_before(STATE_OF, LEVEL)  # in m, before the second products' operands
    M: tl.constexpr = FIRST_M + SECOND
    APART: tl.constexpr = apart_before(ADDS, len(ADDS))
    WAITS: tl.constexpr = PHASE == -1 and OPERANDS > 0
    LAST: tl.constexpr = 1 if FINISH is None else 2  # the part that has all gradients of the trained vectors
    STEPS: tl.constexpr = (PHASE == -1 or PHASE == 1) or (PHASE == 2 and FINISH is not None)
    of_units = spread(units, sums_ptr, counter_ptr, MEANS, H, BLOCK_H, BLOCK_B, ACC)
    if OPERANDS > 0:
        counter_ptr += group * tl.num_programs(1) + tl.program_id(1)
    target = tl.num_programs(0)
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
    WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK

    line = row0 * GROUPS + group
    in_group = group * B + row0
    # A row past the batch reads the last one's gradients from the others (rows do not mix, and it is not stored).
    last_row = (B - 1 - row0).to(tl.int32)
    at_g = r[None, :] * (GROUPS * G * H) + units[:, None]
    at_i = r[None, :] * (GROUPS * APART * H) + units[:, None]
    at_h = r[None, :] * (GROUPS * H) + units[:, None]
    at_c = r[None, :] * (GROUPS * (STATES - 1) * H) + units[:, None]
    at_m = r[None, :] * (GROUPS * M * H) + units[:, None]
    at_s = r[None, :] * (GROUPS * WORDS * H) + units[:, None]
    at_state = r[None, :] * H + units[:, None]
    at_others = r[None, :] * ((STATES - 1) * H) + units[:, None]
    step, sign = nth_step(group, T - 1 - first, T, REVERSED)
    per_step = B.to(tl.int64) * (GROUPS * H)
    begin = step.to(tl.int64) * per_step + line * H
    advance = -sign * per_step
    # y and c have a row more at the start: row step+1 is after the step, and the row it started from is before it.
    y_ptr += begin + per_step + advance
    dgx_ptr += begin * G
    if dy_ptr is not None:
        dy_ptr += begin
    if dcs_ptr is not None:
        dcs_ptr += begin * (STATES - 1)
    if STATES > 1:
        c_ptr += (begin + per_step + advance) * (STATES - 1)
    if SAVED > 0:
        saved_ptr += begin * WORDS
    if APART > 0:
        dhu_ptr += begin * APART
    if M > 0:
        m_ptr += begin * M
    if mask_ptr is not None:
        mask_ptr += step.to(tl.int64) * B + row0
    dsh_ptr += in_group * H
    if STATES > 1:
        dsc_ptr += in_group * ((STATES - 1) * H)
    u_ptr += group * (PRODUCTS * H * H)

    UT = segment_slices(u_ptr, unit0, H, BLOCK_H, BLOCK_B, SEGMENTS, CHUNKS, WARPS, U_IN_REGISTERS, PRECISION)
    if PARAMS > 0:
        params_ptr += group * (PARAMS * H)
    fixed = load_params(params_ptr, units, PARAMS, H, ACC)
    fixed = fixed + draw(dropout_ptr, at_h + line * H, DRAWN, True, ACC)
    sums = zeros(PARAMS, BLOCK_H, BLOCK_B, ACC)
    dstates = load_tiles(dsh_ptr, at_state, mask, 1, 0, ACC)
    after = load_tiles(y_ptr - advance, at_h, mask, 1, 0, ACC)
    if STATES > 1:
        dstates = dstates + load_tiles(dsc_ptr, at_others, mask, STATES - 1, H, ACC)
        after = after + load_tiles(c_ptr - advance * (STATES - 1), at_c, mask, STATES - 1, H, ACC)
    dy, dcs, loaded, words = _load_step(
        dy_ptr, dcs_ptr, y_ptr, c_ptr, saved_ptr, at_h, at_c, at_s, mask, H, STATES, WORDS
    )

    for i in range(first, last):
        code = valid
        before = pack_tiles(loaded, STATES, 1, ACC)
        entering = before
        saved = unpack_tiles(words, SAVED, SAVED_PACK, TYPE, ACC)
        if mask_ptr is not None:
            code = load_mask(mask_ptr, r, valid, group, REVERSED, PADDING)
            entering = keep_rows(before, not_reset(code, PADDING), STATES)
            mask_ptr -= sign * B
        if (1 if SECOND > 0 else 2) > PHASE:
            dstates = add_outer(dstates, dy, dcs, code, PADDING)
        params = fixed + draw(dropout_ptr, at_h + line * H + (step - sign * (i - first)) * per_step, DRAWN, False, ACC)
        met = done + (i - first) * exchanges_before(MEANS, 3)
        dm = ()
        if SECOND > 0:
            if PHASE < 1:
                own = params + of_function(of_units, met, MEANS, 0, BLOCK_B)
                dhu_2, operands_2 = BACKWARD_2(dstates, saved, entering, after, own, FAST)
                if PADDING:
                    dhu_2 = keep_rows(dhu_2, active(code), PRODUCTS - FIRST_PRODUCTS)
                    operands_2 = keep_rows(operands_2, active(code), SECOND)
                store_tiles(m_ptr + FIRST_M * H, at_m, mask, operands_2, 0, SECOND, H)
                for n in tl.static_range(FIRST_PRODUCTS, PRODUCTS):
                    if ADDS[n] >= 0:
                        tl.store(dgx_ptr + at_g + ADDS[n] * H, dhu_2[n - FIRST_PRODUCTS].to(TYPE), mask=mask)
                store_apart(dhu_ptr, at_i, mask, dhu_2, FIRST_PRODUCTS, PRODUCTS, ADDS, H)
            if WAITS:
                arrive(counter_ptr)
                target = wait(counter_ptr, target, PTX)
            if STEPS:
                for n in tl.static_range(LEVEL, OPERANDS):
                    dm = dm + (through_u(
                        None, UT, dgx_ptr, dhu_ptr, last_row, GROUPS * G * H, GROUPS * APART * H, n, ACC, BLOCK_H,
                        BLOCK_B, H, SEGMENTS, CHUNKS, WARPS, PRECISION,
                    ),)  # fmt: skip
        if STEPS:
            own = params + of_function(of_units, met, MEANS, 1, BLOCK_B)
            dgx, dhu, new, dparams, operands = STEP(dstates, dm, saved, entering, after, own, FAST)
            dgx, dhu, new, operands = before_step(dgx, dhu, new, operands, dstates, code, PADDING)
            if FINISH is None or PHASE != 1:
                dstates = new
        if PHASE == -1 or PHASE == 1:
            _store_gx(dgx_ptr, at_g, mask, dgx, 1, G, ADDS, LATE, FIRST_PRODUCTS, H)
            store_apart(dhu_ptr, at_i, mask, dhu, 0, FIRST_PRODUCTS, ADDS, H)
            store_tiles(m_ptr, at_m, mask, operands, 0, FIRST_M, H)
        if WAITS:
            arrive(counter_ptr)
        y_ptr += advance
        if dy_ptr is not None:
            dy_ptr += advance
        if dcs_ptr is not None:
            dcs_ptr += advance * (STATES - 1)
        if STATES > 1:
            c_ptr += advance * (STATES - 1)
        if SAVED > 0:
            saved_ptr += advance * WORDS
        ahead = tl.where(i + 1 < last, mask, False)
        dy, dcs, loaded, words = _load_step(
            dy_ptr, dcs_ptr, y_ptr, c_ptr, saved_ptr, at_h, at_c, at_s, ahead, H, STATES, WORDS
        )
        if WAITS:
            target = wait(counter_ptr, target, PTX)
        if PHASE == -1 or PHASE == 2:
            dv = ()
            for n in tl.static_range(LEVEL):
                if STATE_OF[n] < 0:
                    dv = dv + (through_u(
                        None, UT, dgx_ptr, dhu_ptr, last_row, GROUPS * G * H, GROUPS * APART * H, n, ACC, BLOCK_H,
                        BLOCK_B, H, SEGMENTS, CHUNKS, WARPS, PRECISION,
                    ),)  # fmt: skip
            if FINISH is not None:
                own = params + of_function(of_units, met, MEANS, 2, BLOCK_B)
                dgx, dstates, dparams = finish_step(
                    FINISH, dgx, dstates, dparams, dv, saved, entering, after, own, code, FAST, PADDING
                )
                _store_gx(dgx_ptr, at_g, mask, dgx, 2, G, ADDS, LATE, FIRST_PRODUCTS, H)
            for n in tl.static_range(LEVEL):
                if STATE_OF[n] >= 0:
                    d = through_u(
                        dstates[STATE_OF[n]], UT, dgx_ptr, dhu_ptr, last_row, GROUPS * G * H, GROUPS * APART * H, n,
                        ACC, BLOCK_H, BLOCK_B, H, SEGMENTS, CHUNKS, WARPS, PRECISION,
                    )  # fmt: skip
                    dstates = replace_tile(dstates, STATE_OF[n], d)
        if PHASE == -1 or PHASE == LAST:
            sums = add_params(sums, dparams, valid, code, PADDING)
        if mask_ptr is not None and (PHASE == -1 or PHASE == 2):
            dstates = keep_rows(dstates, not_reset(code, PADDING), STATES)
        dgx_ptr += advance * G
        if APART > 0:
            dhu_ptr += advance * APART
        if M > 0:
            m_ptr += advance * M
        after = before

    exists = units < H
    if len(MEANS) > 0 and PHASE != -1:
        mask &= done == exchanges_before(MEANS, PHASE + 1)
        exists &= done == exchanges_before(MEANS, PHASE + 1)
    shares = ()
    if PARAMS > 0:
        dparams_ptr += (tl.program_id(1) * GROUPS + group) * (PARAMS * H)
        shares = load_tiles(dparams_ptr, units, units < H, PARAMS, H, ACC)
        for n in tl.static_range(PARAMS):
            shares = replace_tile(shares, n, shares[n] + tl.sum(sums[n], 1))
    tl.debug_barrier()  # dsh, dsc and dparams are in place
    store_tiles(dsh_ptr, at_state, mask, dstates, 0, 1, 0)
    if STATES > 1:
        store_tiles(dsc_ptr, at_others, mask, dstates, 1, STATES, H)
    store_tiles(dparams_ptr, units, exists, shares, 0, PARAMS, H)
