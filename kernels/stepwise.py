"""Schedule `stepwise`: one launch a step (two for a cell with a second product), U streamed from L2; any H, any B.

Each program owns BLOCK_H units of BLOCK_B rows. A launch orders the steps, so no program waits for another.
Shapes as in `resident`, and per-launch scratch, all [K, B, H] unless said, in the accumulation type:
    sh, sc    the states h and c in full precision, in place: a program reads and writes its own tile only, with a
              barrier between (the compiler may load and store a tile in different register layouts, so that one warp
              would overwrite what another has not read yet)
    hu_first  [K, B, SPLIT*H]  recurrent product of the first gates, from PHASE 0 to PHASE 1
    m         [B, K, H] the second product's operand, in the data's type
t counts the steps as the group takes them: a reversed group's first is the last in memory.
    dsh, dsc  gradients of the states (dsh without what still has to pass through U); in place likewise
For TF32 products U is rounded before, and forward the step before leaves h rounded in a buffer of its own, h [B, K, H];
otherwise h is None, and y is read. (Rounded where they stream, U and h would double what a launch issues.)
"""

import triton
import triton.language as tl

from .math import operand, product
from .tiles import (
    add_outer,
    after_step,
    before_step,
    biases,
    gate_rows,
    keep_rows,
    kept,
    live,
    load_mask,
    load_tiles,
    pack_tiles,
    split_gates,
    store_tiles,
    unpack_tiles,
    walk,
)


@triton.jit
def _product(
    u_ptr, unit0, x_ptr, line, row_mask, keep, H: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U[n] @ x for the gates n in FROM..TO as a tuple, streaming U [G*H, H] and x in tiles of BLOCK_K. If MASKED, zero
    in the rows where keep is false.

    One product of all gates' rows, unit by unit: one operand of U for the compiler to pipeline, one accumulator.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(TO - FROM)
    at_m, valid_m = gate_rows(unit0, FROM, TO, H, BLOCK_H, PADDED)
    k = tl.arange(0, BLOCK_K)
    at_u = at_m[:, None] + k[None, :]
    at_x = line[None, :] * H + k[:, None]
    acc = tl.zeros([PADDED * BLOCK_H, BLOCK_B], ACC)
    for k0 in range(0, H, BLOCK_K):
        x = tl.load(x_ptr + at_x + k0, mask=row_mask[None, :] & (k0 + k[:, None] < H), other=0.0)
        U = tl.load(u_ptr + at_u + k0, mask=valid_m[:, None] & (k0 + k[None, :] < H), other=0.0)
        acc = product(U, x.to(U.dtype), acc, PRECISION)
    if MASKED:
        # The product and not its operand: rows do not mix. Triton gives an operand the width of the narrowest load that
        # it comes from; that of the mask's byte has no float64 product.
        acc = tl.where(keep[None, :], acc, 0.0)
    return split_gates(acc, TO - FROM, PADDED, BLOCK_H, BLOCK_B)


@triton.jit(do_not_specialize=["t", "T", "B"])
def forward_kernel(
    gx_ptr, u_ptr, bias_ptr, y_ptr, c_ptr, saved_ptr, mask_ptr, sh_ptr, sc_ptr, hu_first_ptr, m_ptr,
    h_ptr, h_after_ptr, t, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, SPLIT: tl.constexpr, INNER: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr,
    PACK: tl.constexpr, SAVE: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr, HOLDS: tl.constexpr,
    PHASE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Step t. PHASE 0: the first product, and the whole step if it is the only one. PHASE 1: the second product."""
    unit0 = tl.program_id(0) * BLOCK_H
    units = unit0 + tl.arange(0, BLOCK_H)
    row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_mask = row < B
    mask = (units[:, None] < H) & row_mask[None, :]
    group = tl.program_id(2).to(tl.int64)
    step, sign = walk(group, t, T, REVERSED)
    steps_before = step.to(tl.int64) * B
    line = row * GROUPS + group
    per_step = B.to(tl.int64) * (GROUPS * H)
    at_h = (line * H)[None, :] + units[:, None]
    at_g = (line * (G * H))[None, :] + units[:, None]
    in_group = group * B + row
    at_state = (in_group * H)[None, :] + units[:, None]
    gx_ptr += step * per_step * G
    y_ptr += (step + 1) * per_step  # after the step
    u_ptr += group * (G * H * H)
    if bias_ptr is not None:
        bias_ptr += group * (INNER * H)

    code = row_mask
    states = load_tiles(sh_ptr, at_state, mask, 1, 0, ACC)
    if STATES == 2:
        states = states + load_tiles(sc_ptr, at_state, mask, 1, 0, ACC)
    if mask_ptr is not None:
        code = load_mask(mask_ptr + steps_before, row, row_mask, group, REVERSED, HOLDS)
        states = keep_rows(states, kept(code, HOLDS), STATES)
    gx = load_tiles(gx_ptr, at_g, mask, G, H, ACC)
    start = biases(bias_ptr, units, tl.zeros([BLOCK_H, BLOCK_B], ACC), G, INNER, H)
    at_first = (in_group * (SPLIT * H))[None, :] + units[:, None]
    hu = ()
    if PHASE == 0:
        if h_ptr is None:
            h_ptr = y_ptr - sign * per_step
        sums = _product(
            u_ptr, unit0, h_ptr, line, row_mask, kept(code, HOLDS), H, 0, SPLIT,
            BLOCK_H, BLOCK_B, BLOCK_K, ACC, mask_ptr is not None, PRECISION,
        )  # fmt: skip
        for n in tl.static_range(SPLIT):
            hu = hu + (sums[n] + start[n],)
    else:
        sums = _product(
            u_ptr, unit0, m_ptr, line, row_mask, row_mask, H, SPLIT, G,
            BLOCK_H, BLOCK_B, BLOCK_K, ACC, False, PRECISION,
        )  # fmt: skip
        hu = load_tiles(hu_first_ptr, at_first, mask, SPLIT, H, ACC)
        for n in tl.static_range(G - SPLIT):
            hu = hu + (sums[n] + start[SPLIT + n],)

    if PHASE == 0 and SPLIT < G:
        store_tiles(hu_first_ptr, at_first, mask, hu, 0, SPLIT, H)
        m = MIDDLE(gx, hu, states, FAST)
        tl.store(m_ptr + at_h, operand(m, m_ptr.dtype.element_ty, PRECISION), mask=mask)
    else:
        new, saved = STEP(gx, hu, states, FAST)
        states, stored = after_step(new, states, code, group, STATES, REVERSED, HOLDS)
        tl.debug_barrier()  # sh and sc are in place
        store_tiles(sh_ptr, at_state, mask, states, 0, 1, 0)
        store_tiles(y_ptr, at_h, mask, stored, 0, 1, 0)
        if h_after_ptr is not None:
            tl.store(h_after_ptr + at_h, operand(states[0], h_after_ptr.dtype.element_ty, PRECISION), mask=mask)
        if STATES == 2:
            store_tiles(sc_ptr, at_state, mask, states, 1, 2, 0)
        if SAVE and STATES == 2:
            store_tiles(c_ptr + (step + 1) * per_step, at_h, mask, stored, 1, 2, 0)
        if SAVED > 0:
            SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
            WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
            at_s = (line * (WORDS * H))[None, :] + units[:, None]
            words = pack_tiles(saved, SAVED, SAVED_PACK, y_ptr.dtype.element_ty)
            store_tiles(saved_ptr + step * per_step * WORDS, at_s, mask, words, 0, WORDS, H)


@triton.jit
def _accumulate_transposed(
    acc, u_ptr, d_ptr, d_stride, units, line, row_mask, H: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + the sum of U[n]^T @ d[n] over the gates n in FROM..TO; d_ptr is where d[FROM] begins."""
    k = tl.arange(0, BLOCK_K)
    TILES: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    # One loop over gates and tiles: one pipeline, and no gate is unrolled next to the others.
    for i in range((TO - FROM) * TILES):
        n = i // TILES
        ks = (i % TILES) * BLOCK_K + k
        at_d = line[None, :] * d_stride + n * H + ks[:, None]
        d = tl.load(d_ptr + at_d, mask=row_mask[None, :] & (ks[:, None] < H), other=0.0)
        at_u = ((FROM + n) * H + ks)[None, :] * H + units[:, None]
        U = tl.load(u_ptr + at_u, mask=(units[:, None] < H) & (ks[None, :] < H), other=0.0)
        acc = product(U, operand(d, U.dtype, PRECISION), acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["t", "T", "B"])
def backward_kernel(
    dy_ptr, dcs_ptr, u_ptr, y_ptr, c_ptr, saved_ptr, mask_ptr, dgx_ptr, dhu_ptr, m_ptr, dsh_ptr, dsc_ptr, t, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, SPLIT: tl.constexpr, INNER: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr,
    PACK: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr, HOLDS: tl.constexpr,
    PHASE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Step t. PHASE 0 takes step t+1's gradients through U^T (not if FIRST, when there is no such step), then does the
    step's own backward; PHASE 1, for a cell with a second product, continues after it. LAST (t = -1) finishes dh0."""
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_mask = row < B
    mask = (units[:, None] < H) & row_mask[None, :]
    group = tl.program_id(2).to(tl.int64)
    step, sign = walk(group, t, T, REVERSED)
    steps_before = step.to(tl.int64) * B
    line = row * GROUPS + group
    per_step = B.to(tl.int64) * (GROUPS * H)
    forth = sign * per_step
    at_h = (line * H)[None, :] + units[:, None]
    at_g = (line * (G * H))[None, :] + units[:, None]
    at_i = (line * (INNER * H))[None, :] + units[:, None]
    at_state = ((group * B + row) * H)[None, :] + units[:, None]
    dgx_ptr += step * per_step * G
    if INNER > 0:
        dhu_ptr += step * per_step * INNER
    u_ptr += group * (G * H * H)

    dh = tl.load(dsh_ptr + at_state, mask=mask, other=0.0)
    if PHASE == 0 and not FIRST:
        dh = _accumulate_transposed(
            dh, u_ptr, dgx_ptr + forth * G, G * H, units, line, row_mask, H, 0, SPLIT - INNER, BLOCK_K, PRECISION
        )
        if INNER > 0:
            dh = _accumulate_transposed(
                dh, u_ptr, dhu_ptr + forth * INNER, INNER * H, units, line, row_mask, H, SPLIT - INNER, SPLIT,
                BLOCK_K, PRECISION,
            )  # fmt: skip
        if mask_ptr is not None:
            code_after = load_mask(mask_ptr + steps_before + sign * B, row, row_mask, group, REVERSED, HOLDS)
            dh = tl.where(kept(code_after, HOLDS)[None, :], dh, 0.0)

    if LAST:
        tl.debug_barrier()  # dsh is in place
        tl.store(dsh_ptr + at_state, dh, mask=mask)
    else:
        dy = ()
        dcs = ()
        if PHASE == 0 and dy_ptr is not None:  # PHASE 1 finds it in dsh
            dy = load_tiles(dy_ptr + step * per_step, at_h, mask, 1, 0, ACC)
        if dcs_ptr is not None:
            dcs = load_tiles(dcs_ptr + step * per_step, at_h, mask, 1, 0, ACC)
        after_row = (step + 1) * per_step
        before_row = after_row - forth
        after = load_tiles(y_ptr + after_row, at_h, mask, 1, 0, ACC)
        before = load_tiles(y_ptr + before_row, at_h, mask, 1, 0, ACC)
        dstates = (dh,)
        if STATES == 2:
            after = after + load_tiles(c_ptr + after_row, at_h, mask, 1, 0, ACC)
            before = before + load_tiles(c_ptr + before_row, at_h, mask, 1, 0, ACC)
            dstates = dstates + load_tiles(dsc_ptr, at_state, mask, 1, 0, ACC)
        saved = ()
        if SAVED > 0:
            SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
            WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
            at_s = (line * (WORDS * H))[None, :] + units[:, None]
            words = load_tiles(saved_ptr + step * per_step * WORDS, at_s, mask, WORDS, H, saved_ptr.dtype.element_ty)
            saved = unpack_tiles(words, SAVED, SAVED_PACK, y_ptr.dtype.element_ty, ACC)
        code = row_mask
        if mask_ptr is not None:
            code = load_mask(mask_ptr + steps_before, row, row_mask, group, REVERSED, HOLDS)
            before = keep_rows(before, kept(code, HOLDS), STATES)
        dstates = add_outer(dstates, dy, dcs, code, HOLDS)

        if PHASE == 0 and SPLIT < G:
            d_second, m = MIDDLE(dstates, saved, before, after, FAST)
            if HOLDS:
                d_second = keep_rows(d_second, live(code), G - SPLIT)
                m = tl.where(live(code)[None, :], m, 0.0)
            tl.debug_barrier()  # dsh is in place
            tl.store(m_ptr + step * per_step + at_h, m.to(m_ptr.dtype.element_ty), mask=mask)
            store_tiles(dgx_ptr + SPLIT * H, at_g, mask, d_second, 0, G - SPLIT, H)
            tl.store(dsh_ptr + at_state, dstates[0], mask=mask)
        else:
            dm = None
            if SPLIT < G:
                dm = _accumulate_transposed(
                    tl.zeros([BLOCK_H, BLOCK_B], ACC), u_ptr, dgx_ptr + SPLIT * H, G * H, units, line, row_mask,
                    H, SPLIT, G, BLOCK_K, PRECISION,
                )  # fmt: skip
            dgx, dhu, new = STEP(dstates, dm, saved, before, after, FAST)
            dgx, dhu, dstates = before_step(dgx, dhu, new, dstates, code, G, STATES, HOLDS)
            tl.debug_barrier()  # dsh and dsc are in place
            # Other programs of this launch read the second gates' dgx, which PHASE 0 wrote: only the first are stored.
            store_tiles(dgx_ptr, at_g, mask, dgx, 0, SPLIT, H)
            if INNER > 0:
                store_tiles(dhu_ptr, at_i, mask, dhu, G - INNER, G, H)
            tl.store(dsh_ptr + at_state, dstates[0], mask=mask)
            if STATES == 2:
                dc = dstates[1]
                if mask_ptr is not None:
                    dc = tl.where(kept(code, HOLDS)[None, :], dc, 0.0)
                tl.store(dsc_ptr + at_state, dc, mask=mask)
