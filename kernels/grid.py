"""Schedule `grid`: one launch walks the whole sequence with U spread over the device, a barrier a step.

Each program owns BLOCK_H hidden units with all their gates, of BLOCK_B batch rows and one group, and keeps its slice of
U on chip. What the others need of a step (h forward, the gates' gradients backward) goes through global memory and L2.

The barrier
-----------
The programs of one batch tile and one group share a counter, zero at launch and never reset: program p's n-th `arrive`
adds one, and `wait(n * programs)` returns once all have arrived n times.

No read is stale. Each value that is exchanged is (1) stored by some warp of the writer, (2) ordered before the
writer's release by the block barrier in `arrive` (Triton up to 3.8 puts none there itself, and a release orders only
what its own thread knows of), (3) made visible to the device by the release, which is cumulative, (4) seen by the
reader's one polling thread, whose acquire reads a counter that includes that release, (5) handed to the reader's other
warps by the block barrier in `wait`, and (6) read with `.cg`, from L2: an older copy in the first-level cache is
never looked at. Each location is written once a launch (y has a row a step), but the operand of a second product, which
is rewritten a step later: between a program's reads of it and any program's next write lies the barrier after y.

No program waits for ever. All are on the device at once, or the cooperative launch fails and none starts; between two
waits a program does finite work and then arrives; so the counter reaches every target. Launches do not share counters:
two streams, or a graph replayed, cannot see each other's. Programs of other tiles and groups are never waited for.

Without a device the interpreter runs programs one after another and a barrier would hang: PHASE then names the part
of a step between two barriers, and a launch does that part of one step only. Parts hand each other what registers
would hold through `sh`, `sc` and `hu_first`; the code is the same.

Shapes are those of `resident`; scratch is that of `stepwise`; counter [groups * batch tiles] int32, zero.
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
    replace_first,
    split_gates,
    store_tiles,
    unpack_tiles,
    walk,
)


@triton.jit
def arrive(counter_ptr):
    """Publish what this program has stored, and count it in. See the module's docstring."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target):
    """Until the counter reaches target; then every load sees what was published. See the module's docstring."""
    # An atomic that adds nothing is the portable acquiring load.
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _load_u(
    u_ptr, at_m, valid_m, k_stride, k0, K: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U's elements at_m[m] + k * k_stride for k0 <= k < k0 + SIZE: [M, SIZE], or [PARTS, M, SIZE / PARTS]."""
    PART: tl.constexpr = SIZE // PARTS
    if PARTS == 1:
        ks = (k0 + tl.arange(0, PART))[None, :]
        U = tl.load(u_ptr + at_m[:, None] + ks * k_stride, mask=valid_m[:, None] & (ks < K), other=0.0)
    else:
        ks = k0 + tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
        mask = valid_m[None, :, None] & (ks < K)
        U = tl.load(u_ptr + at_m[None, :, None] + ks * k_stride, mask=mask, other=0.0)
    return operand(U, U.dtype, PRECISION)


@triton.jit
def _load_x(
    x_ptr, at_row, keep, k0, K: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The operand that meets it, from L2: [SIZE, rows], or [PARTS, SIZE / PARTS, rows]; zero where keep is false.

    Not masked where all columns exist (WHOLE): a masked load's registers are taken from the moment they are zeroed.
    """
    PART: tl.constexpr = SIZE // PARTS
    if PARTS == 1:
        ks = (k0 + tl.arange(0, PART))[:, None]
        rows = at_row[None, :]
        kept = keep[None, :]
    else:
        ks = k0 + tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, :, None]
        rows = at_row[None, None, :]
        kept = keep[None, None, :]
    if WHOLE:
        x = tl.load(x_ptr + rows + ks, cache_modifier=".cg")
    else:
        x = tl.load(x_ptr + rows + ks, mask=tl.broadcast_to(ks < K, (rows + ks).shape), other=0.0, cache_modifier=".cg")
    if MASKED:
        x = tl.where(kept, x, 0.0).to(x.dtype)
    return x


@triton.jit
def _slice(
    u_ptr, at_m, valid_m, k_stride, M: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr
):
    """A program's rows of U, in chunks of CHUNK columns and a last one of what is left (sizes: `plan.chunks`).

    Rows below 64 would leave warps idle, or repeating each other's work: they share the inner sum instead.
    """
    PARTS: tl.constexpr = 64 // M if M < 64 else 1
    WHOLE: tl.constexpr = K // CHUNK
    REST: tl.constexpr = triton.next_power_of_2(K - WHOLE * CHUNK) if K > WHOLE * CHUNK else 0
    chunks = ()
    for n in tl.static_range(WHOLE):
        chunks = chunks + (_load_u(u_ptr, at_m, valid_m, k_stride, n * CHUNK, K, PARTS, CHUNK, PRECISION),)
    if REST > 0:
        LAST: tl.constexpr = 16 * PARTS if REST < 16 * PARTS else REST
        chunks = chunks + (_load_u(u_ptr, at_m, valid_m, k_stride, WHOLE * CHUNK, K, PARTS, LAST, PRECISION),)
    return chunks


@triton.jit
def _sum(acc, N: tl.constexpr, M: tl.constexpr, BLOCK_B: tl.constexpr):
    """The sum over the first of acc's three axes, N long (a power of two). [M, BLOCK_B]

    By halves and not tl.sum: one trip through shared memory brings a thread all its parts, and the result is free of
    the product's register layout, which the rest of the step would inherit and leave again tile by tile.
    """
    if N == 1:
        return tl.reshape(acc, [M, BLOCK_B])
    else:
        a, b = tl.split(tl.permute(tl.reshape(acc, [2, N // 2, M, BLOCK_B]), (1, 2, 3, 0)))
        return _sum(a + b, N // 2, M, BLOCK_B)


@triton.jit
def _product(
    U, x_ptr, at_row, keep, ACC: tl.constexpr, M: tl.constexpr, BLOCK_B: tl.constexpr, K: tl.constexpr,
    CHUNK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U @ x [M, BLOCK_B], U as `_slice` gives it, x[k, row] at x_ptr + at_row + k: what others have published."""
    PARTS: tl.constexpr = 64 // M if M < 64 else 1
    WHOLE: tl.constexpr = K // CHUNK
    REST: tl.constexpr = triton.next_power_of_2(K - WHOLE * CHUNK) if K > WHOLE * CHUNK else 0
    if PARTS == 1:  # noqa: SIM108  (the compiler wants both shapes apart)
        acc = tl.zeros([M, BLOCK_B], ACC)
    else:
        acc = tl.zeros([PARTS, M, BLOCK_B], ACC)
    for n in tl.static_range(WHOLE):
        x = _load_x(x_ptr, at_row, keep, n * CHUNK, K, PARTS, CHUNK, True, MASKED)
        acc = product(U[n], operand(x, U[n].dtype, PRECISION), acc, PRECISION)
    if REST > 0:
        LAST: tl.constexpr = 16 * PARTS if REST < 16 * PARTS else REST
        x = _load_x(x_ptr, at_row, keep, WHOLE * CHUNK, K, PARTS, LAST, False, MASKED)
        acc = product(U[WHOLE], operand(x, U[WHOLE].dtype, PRECISION), acc, PRECISION)
    return acc if PARTS == 1 else _sum(acc, PARTS, M, BLOCK_B)


@triton.jit(do_not_specialize=["first", "last", "T", "B"])
def forward_kernel(
    gx_ptr, u_ptr, bias_ptr, y_ptr, c_ptr, saved_ptr, mask_ptr, sh_ptr, sc_ptr, hu_first_ptr, m_ptr, counter_ptr,
    first, last, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, CHUNK: tl.constexpr, CHUNK_2: tl.constexpr,
    ACC: tl.constexpr, G: tl.constexpr, SPLIT: tl.constexpr, INNER: tl.constexpr, STATES: tl.constexpr,
    SAVED: tl.constexpr, PACK: tl.constexpr, SAVE: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr,
    HOLDS: tl.constexpr, PHASE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Steps first..last-1. PHASE -1: all of each. 0: the first product, and the step if that is all. 1: the second."""
    group = tl.program_id(2).to(tl.int64)
    unit0 = tl.program_id(0) * BLOCK_H
    units = unit0 + tl.arange(0, BLOCK_H)
    r = tl.arange(0, BLOCK_B)
    row0 = tl.program_id(1).to(tl.int64) * BLOCK_B
    valid = r < B - row0
    mask = (units[:, None] < H) & valid[None, :]
    counter_ptr += group * tl.num_programs(1) + tl.program_id(1)
    target = tl.num_programs(0)
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
    WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
    PADDED: tl.constexpr = triton.next_power_of_2(SPLIT)
    PADDED_2: tl.constexpr = triton.next_power_of_2(G - SPLIT) if SPLIT < G else 1

    # Offsets inside a tile are small; where the tile begins is a 64-bit scalar.
    line = row0 * GROUPS + group
    in_group = group * B + row0
    # A row past the batch reads the last one's states from the others (rows do not mix, and it is not stored).
    h_row = tl.minimum(r, B - 1 - row0).to(tl.int32) * (GROUPS * H)
    at_h = r[None, :] * (GROUPS * H) + units[:, None]
    at_g = r[None, :] * (GROUPS * G * H) + units[:, None]
    at_s = r[None, :] * (GROUPS * WORDS * H) + units[:, None]
    at_state = r[None, :] * H + units[:, None]
    at_first = r[None, :] * (SPLIT * H) + units[:, None]
    step, sign = walk(group, first, T, REVERSED)
    per_step = B.to(tl.int64) * (GROUPS * H)
    begin = step.to(tl.int64) * per_step + line * H
    forth = sign * per_step
    gx_ptr += begin * G
    y_ptr += begin + per_step - forth  # the row before the step
    if SAVE and STATES == 2:
        c_ptr += begin + per_step
    if SAVED > 0:
        saved_ptr += begin * WORDS
    sh_ptr += in_group * H
    if STATES == 2:
        sc_ptr += in_group * H
    if SPLIT < G:
        m_ptr += line * H
        hu_first_ptr += in_group * (SPLIT * H)
    u_ptr += group * (G * H * H)
    if bias_ptr is not None:
        bias_ptr += group * (INNER * H)

    at_m, valid_m = gate_rows(unit0, 0, SPLIT, H, BLOCK_H, PADDED)
    U = _slice(u_ptr, at_m, valid_m, 1, PADDED * BLOCK_H, H, CHUNK, PRECISION)
    if SPLIT < G:
        at_m, valid_m = gate_rows(unit0, SPLIT, G, H, BLOCK_H, PADDED_2)
        U_2 = _slice(u_ptr, at_m, valid_m, 1, PADDED_2 * BLOCK_H, H, CHUNK_2, PRECISION)
    start = biases(bias_ptr, units, tl.zeros([BLOCK_H, BLOCK_B], ACC), G, INNER, H)
    states = load_tiles(sh_ptr, at_state, mask, 1, 0, ACC)
    if STATES == 2:
        states = states + load_tiles(sc_ptr, at_state, mask, 1, 0, ACC)
    loaded = load_tiles(gx_ptr, at_g, mask, G, H, TYPE)
    code = valid
    if mask_ptr is not None:
        mask_ptr += step.to(tl.int64) * B + row0
        code = load_mask(mask_ptr, r, valid, group, REVERSED, HOLDS)

    for i in range(first, last):
        gx = pack_tiles(loaded, G, 1, ACC)
        if mask_ptr is not None:
            states = keep_rows(states, kept(code, HOLDS), STATES)
        if PHASE != 1:
            acc = _product(
                U, y_ptr, h_row, kept(code, HOLDS), ACC, PADDED * BLOCK_H, BLOCK_B, H, CHUNK,
                mask_ptr is not None, PRECISION,
            )  # fmt: skip
            sums = split_gates(acc, SPLIT, PADDED, BLOCK_H, BLOCK_B)
            hu = ()
            for n in tl.static_range(SPLIT):
                hu = hu + (sums[n] + start[n],)
        else:
            hu = load_tiles(hu_first_ptr, at_first, mask, SPLIT, H, ACC)
        if SPLIT < G:
            if PHASE != 1:
                m = MIDDLE(gx, hu, states, FAST)
                tl.store(m_ptr + at_h, m.to(TYPE), mask=mask)
            if PHASE == 0:
                store_tiles(hu_first_ptr, at_first, mask, hu, 0, SPLIT, H)
            if PHASE == -1:
                arrive(counter_ptr)
                wait(counter_ptr, target)
                target += tl.num_programs(0)
            if PHASE != 0:
                acc = _product(
                    U_2, m_ptr, h_row, valid, ACC, PADDED_2 * BLOCK_H, BLOCK_B, H, CHUNK_2,
                    False, PRECISION,
                )  # fmt: skip
                sums = split_gates(acc, G - SPLIT, PADDED_2, BLOCK_H, BLOCK_B)
                for n in tl.static_range(G - SPLIT):
                    hu = hu + (sums[n] + start[SPLIT + n],)
        if SPLIT == G or PHASE != 0:
            new, saved = STEP(gx, hu, states, FAST)
            states, stored = after_step(new, states, code, group, STATES, REVERSED, HOLDS)
            y_ptr += forth
            store_tiles(y_ptr, at_h, mask, stored, 0, 1, 0)
            if PHASE == -1:
                arrive(counter_ptr)
            # None waits for the rest of the step: stored, and the next step's input asked for, behind the arrival.
            if SAVE and STATES == 2:
                store_tiles(c_ptr, at_h, mask, stored, 1, 2, 0)
                c_ptr += forth
            if SAVED > 0:
                store_tiles(saved_ptr, at_s, mask, pack_tiles(saved, SAVED, SAVED_PACK, TYPE), 0, WORDS, H)
                saved_ptr += forth * WORDS
            ahead = tl.where(i + 1 < last, mask, False)
            gx_ptr += forth * G
            loaded = load_tiles(gx_ptr, at_g, ahead, G, H, TYPE)
            if mask_ptr is not None:
                mask_ptr += sign * B
                code = load_mask(mask_ptr, r, tl.where(i + 1 < last, valid, False), group, REVERSED, HOLDS)
            if PHASE == -1:
                wait(counter_ptr, target)
                target += tl.num_programs(0)

    tl.debug_barrier()  # sh and sc are in place (see `stepwise`), and a launch may be less than a step
    store_tiles(sh_ptr, at_state, mask, states, 0, 1, 0)
    if STATES == 2:
        store_tiles(sc_ptr, at_state, mask, states, 1, 2, 0)


@triton.jit
def _load_step(
    dy_ptr, dcs_ptr, y_ptr, c_ptr, saved_ptr, at_h, at_s, mask,
    H: tl.constexpr, STATES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """What a step of backward reads: dy and dcs (empty where there is none), the states before it, saved words."""
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    dy = ()
    if dy_ptr is not None:
        dy = load_tiles(dy_ptr, at_h, mask, 1, 0, TYPE)
    dcs = ()
    if dcs_ptr is not None:
        dcs = load_tiles(dcs_ptr, at_h, mask, 1, 0, TYPE)
    before = load_tiles(y_ptr, at_h, mask, 1, 0, TYPE)
    if STATES == 2:
        before = before + load_tiles(c_ptr, at_h, mask, 1, 0, TYPE)
    return dy, dcs, before, load_tiles(saved_ptr, at_s, mask, WORDS, H, saved_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["first", "last", "T", "B"])
def backward_kernel(
    dy_ptr, dcs_ptr, u_ptr, y_ptr, c_ptr, saved_ptr, mask_ptr, dgx_ptr, dhu_ptr, m_ptr, dsh_ptr, dsc_ptr, counter_ptr,
    first, last, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, CHUNK: tl.constexpr, CHUNK_2: tl.constexpr,
    ACC: tl.constexpr, G: tl.constexpr, SPLIT: tl.constexpr, INNER: tl.constexpr, STATES: tl.constexpr,
    SAVED: tl.constexpr, PACK: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr,
    HOLDS: tl.constexpr, PHASE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Steps T-1-first..T-last, back in time. PHASE -1: all of each. 0: up to the second product. 1: the pointwise step.
    2: its gradients through U^T."""
    group = tl.program_id(2).to(tl.int64)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    r = tl.arange(0, BLOCK_B)
    row0 = tl.program_id(1).to(tl.int64) * BLOCK_B
    valid = r < B - row0
    mask = (units[:, None] < H) & valid[None, :]
    counter_ptr += group * tl.num_programs(1) + tl.program_id(1)
    target = tl.num_programs(0)
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
    WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
    PLAIN: tl.constexpr = SPLIT - INNER  # gates of the first product whose dhu is their dgx

    line = row0 * GROUPS + group
    in_group = group * B + row0
    # A row past the batch reads the last one's gradients from the others (rows do not mix, and it is not stored).
    row = tl.minimum(r, B - 1 - row0).to(tl.int32)
    gx_row = row * (GROUPS * G * H)
    inner_row = row * (GROUPS * INNER * H)
    at_g = r[None, :] * (GROUPS * G * H) + units[:, None]
    at_i = r[None, :] * (GROUPS * INNER * H) + units[:, None]
    at_h = r[None, :] * (GROUPS * H) + units[:, None]
    at_s = r[None, :] * (GROUPS * WORDS * H) + units[:, None]
    at_state = r[None, :] * H + units[:, None]
    step, sign = walk(group, T - 1 - first, T, REVERSED)
    per_step = B.to(tl.int64) * (GROUPS * H)
    begin = step.to(tl.int64) * per_step + line * H
    forth = -sign * per_step
    # y and c have a row more at the start: row step+1 is after the step, and the one it came from before it.
    y_ptr += begin + per_step + forth
    dgx_ptr += begin * G
    if dy_ptr is not None:
        dy_ptr += begin
    if dcs_ptr is not None:
        dcs_ptr += begin
    if STATES == 2:
        c_ptr += begin + per_step + forth
    if SAVED > 0:
        saved_ptr += begin * WORDS
    if INNER > 0:
        dhu_ptr += begin * INNER
    if SPLIT < G:
        m_ptr += begin
    if mask_ptr is not None:
        mask_ptr += step.to(tl.int64) * B + row0
    dsh_ptr += in_group * H
    if STATES == 2:
        dsc_ptr += in_group * H
    u_ptr += group * (G * H * H)

    there = units < H
    if PLAIN > 0:
        UT = _slice(u_ptr, units, there, H, BLOCK_H, PLAIN * H, CHUNK, PRECISION)
    if INNER > 0:
        UT_inner = _slice(
            u_ptr + PLAIN * H * H, units, there, H, BLOCK_H, INNER * H, CHUNK_2 if PLAIN > 0 else CHUNK, PRECISION
        )
    if SPLIT < G:
        UT_2 = _slice(u_ptr + SPLIT * H * H, units, there, H, BLOCK_H, (G - SPLIT) * H, CHUNK_2, PRECISION)
    dstates = load_tiles(dsh_ptr, at_state, mask, 1, 0, ACC)
    after = load_tiles(y_ptr - forth, at_h, mask, 1, 0, ACC)
    if STATES == 2:
        dstates = dstates + load_tiles(dsc_ptr, at_state, mask, 1, 0, ACC)
        after = after + load_tiles(c_ptr - forth, at_h, mask, 1, 0, ACC)
    dy, dcs, loaded, words = _load_step(dy_ptr, dcs_ptr, y_ptr, c_ptr, saved_ptr, at_h, at_s, mask, H, STATES, WORDS)

    for i in range(first, last):
        code = valid
        before = pack_tiles(loaded, STATES, 1, ACC)
        came = before
        saved = unpack_tiles(words, SAVED, SAVED_PACK, TYPE, ACC)
        if mask_ptr is not None:
            code = load_mask(mask_ptr, r, valid, group, REVERSED, HOLDS)
            came = keep_rows(before, kept(code, HOLDS), STATES)
            mask_ptr -= sign * B
        if (1 if SPLIT < G else 2) > PHASE:
            dstates = add_outer(dstates, dy, dcs, code, HOLDS)
        dm = None
        if SPLIT < G:
            if PHASE < 1:
                d_second, m = MIDDLE(dstates, saved, came, after, FAST)
                if HOLDS:
                    d_second = keep_rows(d_second, live(code), G - SPLIT)
                    m = tl.where(live(code)[None, :], m, 0.0)
                tl.store(m_ptr + at_h, m.to(TYPE), mask=mask)
                store_tiles(dgx_ptr + SPLIT * H, at_g, mask, d_second, 0, G - SPLIT, H)
                m_ptr += forth
            if PHASE == -1:
                arrive(counter_ptr)
                wait(counter_ptr, target)
                target += tl.num_programs(0)
            if PHASE == -1 or PHASE == 1:
                dm = _product(
                    UT_2, dgx_ptr + SPLIT * H, gx_row, valid, ACC, BLOCK_H, BLOCK_B, (G - SPLIT) * H,
                    CHUNK_2, False, PRECISION,
                )  # fmt: skip
        if PHASE == -1 or PHASE == 1:
            dgx, dhu, new = STEP(dstates, dm, saved, came, after, FAST)
            dgx, dhu, dstates = before_step(dgx, dhu, new, dstates, code, G, STATES, HOLDS)
            # Other programs of this launch may still read the second gates' dgx: only the first are stored.
            store_tiles(dgx_ptr, at_g, mask, dgx, 0, SPLIT, H)
            if INNER > 0:
                store_tiles(dhu_ptr, at_i, mask, dhu, G - INNER, G, H)
        if PHASE == -1:
            arrive(counter_ptr)
        after = before
        y_ptr += forth
        if dy_ptr is not None:
            dy_ptr += forth
        if dcs_ptr is not None:
            dcs_ptr += forth
        if STATES == 2:
            c_ptr += forth
        if SAVED > 0:
            saved_ptr += forth * WORDS
        ahead = tl.where(i + 1 < last, mask, False)
        dy, dcs, loaded, words = _load_step(
            dy_ptr, dcs_ptr, y_ptr, c_ptr, saved_ptr, at_h, at_s, ahead, H, STATES, WORDS
        )
        if PHASE == -1:
            wait(counter_ptr, target)
            target += tl.num_programs(0)
        if PHASE == -1 or PHASE == 2:
            dh = dstates[0]
            if PLAIN > 0:
                dh += _product(UT, dgx_ptr, gx_row, valid, ACC, BLOCK_H, BLOCK_B, PLAIN * H, CHUNK, False, PRECISION)
            if INNER > 0:
                dh += _product(
                    UT_inner, dhu_ptr, inner_row, valid, ACC, BLOCK_H, BLOCK_B, INNER * H,
                    CHUNK_2 if PLAIN > 0 else CHUNK,
                    False, PRECISION,
                )  # fmt: skip
            dstates = replace_first(dstates, dh, STATES)
            if mask_ptr is not None:
                dstates = keep_rows(dstates, kept(code, HOLDS), STATES)
        dgx_ptr += forth * G
        if INNER > 0:
            dhu_ptr += forth * INNER

    tl.debug_barrier()  # dsh and dsc are in place
    store_tiles(dsh_ptr, at_state, mask, dstates, 0, 1, 0)
    if STATES == 2:
        store_tiles(dsc_ptr, at_state, mask, dstates, 1, 2, 0)
