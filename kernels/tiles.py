"""Tiles and tuples of tiles: the loads, stores and products the schedules share.

Words: several tiles of the data's type packed into one tile of 64-bit integers (PACK of them: 4 of 16 bits, 2 of 32;
float64 is not packed), the form in which gates are saved for backward: one load or store for all of them.

A tile is [units, rows]: hidden units down, batch rows across, so that the recurrent product U h has its many units on
the tensor cores' long side and a small batch on the short one. In memory the units are contiguous.

Mask: a code for each row and step. 0: a plain step. 1: the states before it are reset to zero. 2: the row is past its
end, so this step is padding: its states pass through, and it has no output and no gradients. Padding is left out by
selection, never by a product with zero: its gx, dy and saved gates may be anything, NaN included. The constexpr PADDING
says that the mask may have 2s.

Groups: scans that share only their shapes and the launch (the two directions of a layer, block-diagonal heads).
A row of memory holds one batch row's groups side by side.
"""

import triton
import triton.language as tl

from .math import INTERPRETED, is_one_chain, new_chain, operand, product


@triton.constexpr_function
def first_product(gates, n):
    """The first product of the n-th operand; for n = the number of operands, the number of products. gates: the
    products of each operand."""
    return sum(gates[:n])


@triton.constexpr_function
def apart_before(adds, n):
    """How many of the first n products are apart (see `form`)."""
    return sum(tile < 0 for tile in adds[:n])


@triton.constexpr_function
def computed_before(state_of, n):
    """How many of the first n operands of level 1 are computed, not a state."""
    return sum(state < 0 for state in state_of[:n])


@triton.constexpr_function
def others_are_operands(state_of):
    """Whether some operand is a state other than the first."""
    return any(state > 0 for state in state_of)


@triton.constexpr_function
def is_in(n, numbers, first=0):
    """Whether n is among the numbers from the first on."""
    return n in tuple(numbers)[first:]


@triton.jit
def nth_step(group, n, T, REVERSED: tl.constexpr):
    """The n-th step a group takes, and +1 or -1, where the next one lies: from the first step to the last, or, for the
    groups whose bit is set in REVERSED, from the last to the first."""
    if REVERSED == 0:
        return n, 1
    else:
        back = ((REVERSED >> group) & 1).to(tl.int32)
        return n + back * (T - 1 - 2 * n), 1 - 2 * back


@triton.jit
def cast_tiles(tiles, N: tl.constexpr, TYPE: tl.constexpr):
    out = ()
    for n in tl.static_range(N):
        out = out + (tiles[n].to(TYPE),)
    return out


@triton.jit
def load_tiles(ptr, offsets, mask, N: tl.constexpr, STRIDE: tl.constexpr, TYPE: tl.constexpr):
    """N tiles, STRIDE elements apart, as a tuple; zero where masked."""
    tiles = ()
    for n in tl.static_range(N):
        tiles = tiles + (tl.load(ptr + offsets + n * STRIDE, mask=mask, other=0.0).to(TYPE),)
    return tiles


@triton.jit
def store_tiles(ptr, offsets, mask, tiles, FROM: tl.constexpr, TO: tl.constexpr, STRIDE: tl.constexpr):
    """tiles[FROM:TO], each STRIDE elements after the one before; ptr is where tiles[FROM] goes."""
    for n in tl.static_range(FROM, TO):
        tl.store(ptr + offsets + (n - FROM) * STRIDE, tiles[n].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_apart(dhu_ptr, at_i, mask, dhu, FROM: tl.constexpr, TO: tl.constexpr, ADDS: tl.constexpr, H: tl.constexpr):
    """dhu[0] is product FROM's: those that are apart, to dhu."""
    for n in tl.static_range(FROM, TO):
        if ADDS[n] < 0:
            tl.store(dhu_ptr + at_i + apart_before(ADDS, n) * H, dhu[n - FROM].to(dhu_ptr.dtype.element_ty), mask=mask)


@triton.jit
def operands(tiles, N: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Each of the tiles as an operand of `product`."""
    out = ()
    for n in tl.static_range(N):
        out = out + (operand(tiles[n], TYPE, PRECISION),)
    return out


@triton.jit
def products(U, x, start, FROM: tl.constexpr, TO: tl.constexpr, PRECISION: tl.constexpr):
    """start[n] + U[n] @ x for n in FROM..TO, as a tuple. U are operands already; x is made one."""
    x = operand(x, U[FROM].dtype, PRECISION)
    out = ()
    for n in tl.static_range(FROM, TO):
        out = out + (product(U[n], x, start[n], PRECISION),)
    return out


@triton.jit
def sum_products(U, x, start, zero, FROM: tl.constexpr, TO: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """start + the sum of U[n] @ x[n - FIRST] for n in FROM..TO, all of them operands. Each product is a chain of its
    own, and they are added as a tree, unless one chain is shorter."""
    if TO - FROM < 2 or is_one_chain(U[FROM].shape[1], zero.shape[1], U[FROM].dtype, PRECISION):
        for n in tl.static_range(FROM, TO):
            start = product(U[n], x[n - FIRST], start, PRECISION)
        return start
    else:
        HALF: tl.constexpr = FROM + (TO - FROM + 1) // 2
        a = sum_products(U, x, start, zero, FROM, HALF, FIRST, PRECISION)
        return a + sum_products(U, x, new_chain(zero), zero, HALF, TO, FIRST, PRECISION)


@triton.jit
def inside(tile, units, H: tl.constexpr, TYPE: tl.constexpr, FAST: tl.constexpr):
    """The tile, for `operand`, with its units beyond H set to zero."""
    if tile.shape[0] == H:
        return tile
    elif FAST and not INTERPRETED:
        # One instruction for two elements; a selection takes five.
        x = tile.to(TYPE)
        ones = tl.broadcast_to(tl.where(units < H, -1, 0).to(tl.int16)[:, None], x.shape)
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [x, ones], dtype=x.dtype, is_pure=True, pack=2
        )
    else:
        return tl.where((units < H)[:, None], tile, 0.0)


@triton.jit
def inside_all(tiles, units, N: tl.constexpr, H: tl.constexpr, TYPE: tl.constexpr, FAST: tl.constexpr):
    """`inside` of the first N tiles."""
    out = ()
    for n in tl.static_range(N):
        out = out + (inside(tiles[n], units, H, TYPE, FAST),)
    return out


@triton.jit
def replace_tile(tiles, at: tl.constexpr, tile):
    """The tiles with another in the place of one."""
    out = ()
    for n in tl.static_range(len(tiles)):
        out = out + (tile if n == at else tiles[n],)
    return out


@triton.jit
def keep_rows(tiles, keep, N: tl.constexpr):
    """The tiles with the rows (columns of a tile) where keep is false set to zero."""
    out = ()
    for n in tl.static_range(N):
        out = out + (tl.where(keep[None, :], tiles[n], 0.0),)
    return out


@triton.jit
def load_mask(mask_ptr, r, valid, group, REVERSED: tl.constexpr, PADDING: tl.constexpr):
    """What the mask says of the rows r at a step: 0, 1 (reset) or 2 (padding); read it with `not_reset` and `active`.

    Without padding it is only whether the code is 0: one bit to carry from step to step, not a byte.
    """
    code = tl.load(mask_ptr + r, mask=valid, other=0)
    if PADDING:
        if REVERSED > 0:  # reversed groups start an episode at its other end, so they have a bit of their own
            back = ((REVERSED >> group) & 1).to(tl.uint8)
            code = ((code >> (2 * back)) & 1) | (code & 2)
        return code
    else:
        return code == 0


@triton.jit
def not_reset(code, PADDING: tl.constexpr):
    """The rows whose states enter the step; the others' are reset to zero."""
    return code != 1 if PADDING else code


@triton.jit
def active(code):
    """The rows that take the step; for the others it is padding. Only with PADDING."""
    return code != 2


@triton.jit
def _select_rows(tiles, others, first, N: tl.constexpr):
    """The tiles, with the rows of others where first is false."""
    out = ()
    for n in tl.static_range(N):
        out = out + (tl.where(first[None, :], tiles[n], others[n]),)
    return out


@triton.jit
def after_step(new, old, code, group, STATES: tl.constexpr, REVERSED: tl.constexpr, PADDING: tl.constexpr):
    """The states after a step, and what is stored of them.

    Padding leaves the states as they were and stores zero. But a reversed group's padding comes before its first active
    step, which reads the states it starts from there.
    """
    if PADDING:
        states = _select_rows(new, old, active(code), STATES)
        if REVERSED == 0:
            stored = keep_rows(states, active(code), STATES)
        else:
            stored = keep_rows(states, active(code) | (((REVERSED >> group) & 1) != 0), STATES)
        return states, stored
    else:
        return new, new


@triton.jit
def add_outer(dstates, dy, dcs, code, PADDING: tl.constexpr):
    """dstates plus the gradients that reach the states after a step from outside the scan. dy: the first state's, or
    empty; dcs: the others', or empty."""
    out = ()
    for n in tl.static_range(len(dstates)):
        outer = dy if n == 0 else dcs
        if len(outer) == 0:
            out = out + (dstates[n],)
        elif PADDING:
            out = out + (
                dstates[n] + tl.where(active(code)[None, :], outer[n - 1 if n > 0 else 0].to(dstates[n].dtype), 0.0),
            )
        else:
            out = out + (dstates[n] + outer[n - 1 if n > 0 else 0].to(dstates[n].dtype),)
    return out


@triton.jit
def before_step(dgx, dhu, new, computed, old, code, PADDING: tl.constexpr):
    """The results of a step of backward. For padding dgx, dhu and operands are zero, and dstates as they were."""
    if PADDING:
        dgx = keep_rows(dgx, active(code), len(dgx))
        dhu = keep_rows(dhu, active(code), len(dhu))
        computed = keep_rows(computed, active(code), len(computed))
        return dgx, dhu, _select_rows(new, old, active(code), len(new)), computed
    else:
        return dgx, dhu, new, computed


@triton.jit
def finish_step(
    FINISH: tl.constexpr, dgx, dbefore, dparams, dv, saved, before, after, params, code, FAST: tl.constexpr,
    PADDING: tl.constexpr,
):  # fmt: skip
    """FINISH, which changes nothing for padding."""
    dgx_2, dbefore_2, dparams = FINISH(dgx, dbefore, dparams, dv, saved, before, after, params, FAST)
    if PADDING:
        dgx_2 = _select_rows(dgx_2, dgx, active(code), len(dgx))
        dbefore_2 = _select_rows(dbefore_2, dbefore, active(code), len(dbefore))
    return dgx_2, dbefore_2, dparams


@triton.jit
def add_params(total, dparams, valid, code, PADDING: tl.constexpr):
    """total (see `zero_sums`) + dparams, tile by tile, of the rows that exist and take the step."""
    keep = valid & active(code) if PADDING else valid
    out = ()
    for n in tl.static_range(len(total)):
        more = tl.where(keep[None, :], dparams[n], 0.0)
        out = out + (total[n] + (tl.sum(more, 1) if len(total[n].shape) == 1 else more),)
    return out


@triton.jit
def zero_sums(PARAMS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, ACC: tl.constexpr):
    """Zero sums of the trained vectors' gradients, which a program carries from step to step: tiles; of more than eight
    vectors they would spill registers (found with the report), and rows are summed at each step."""
    out = ()
    for _ in tl.static_range(PARAMS):
        out = out + (tl.zeros([BLOCK_H], ACC) if PARAMS > 8 else tl.zeros([BLOCK_H, BLOCK_B], ACC),)
    return out


@triton.jit
def load_params(params_ptr, units, PARAMS: tl.constexpr, H: tl.constexpr, ACC: tl.constexpr):
    """The trained vectors of a group, as tiles [units, 1]. params_ptr: the start of the group's."""
    out = ()
    for n in tl.static_range(PARAMS):
        out = out + (tl.load(params_ptr + n * H + units, mask=units < H, other=0.0).to(ACC)[:, None],)
    return out


@triton.jit
def zeros(N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, ACC: tl.constexpr):
    """N tiles of zeros."""
    out = ()
    for _ in tl.static_range(N):
        out = out + (tl.zeros([BLOCK_H, BLOCK_B], ACC),)
    return out


@triton.jit
def biases(bias_ptr, units, zero, ADDS: tl.constexpr, H: tl.constexpr):
    """The initial value of each recurrent product: zero, or b_hh for those that are apart (bias [apart*H])."""
    out = ()
    for n in tl.static_range(len(ADDS)):
        if bias_ptr is None or ADDS[n] >= 0:
            out = out + (zero,)
        else:
            b = tl.load(bias_ptr + apart_before(ADDS, n) * H + units, mask=units < H, other=0.0)
            out = out + (zero + b.to(zero.dtype)[:, None],)
    return out


@triton.jit
def split_gates(acc, G: tl.constexpr, PADDED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """The G gates' tiles [BLOCK_H, BLOCK_B] of a product whose row is unit * PADDED + gate (see `gate_rows`)."""
    if PADDED == 1:
        return (acc,)
    else:
        pairs = tl.reshape(acc, [BLOCK_H, PADDED // 2, 2, BLOCK_B])
        even, odd = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        HALF: tl.constexpr = PADDED // 2
        evens = split_gates(tl.reshape(even, [BLOCK_H * HALF, BLOCK_B]), HALF, HALF, BLOCK_H, BLOCK_B)
        odds = split_gates(tl.reshape(odd, [BLOCK_H * HALF, BLOCK_B]), HALF, HALF, BLOCK_H, BLOCK_B)
        tiles = ()
        for n in tl.static_range(G):
            tiles = tiles + (evens[n // 2] if n % 2 == 0 else odds[n // 2],)
        return tiles


@triton.jit
def gate_rows(m, unit0, FROM: tl.constexpr, TO: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr):
    """Where in U row m of a slice starts (row unit * PADDED + gate), and whether it exists."""
    unit = unit0 + m // PADDED
    gate = m % PADDED
    return ((FROM + gate) * H + unit) * H, (unit < H) & (gate < TO - FROM)


@triton.jit
def _bits(x, TYPE: tl.constexpr):
    if TYPE.primitive_bitwidth == 16:
        return x.to(TYPE).to(tl.uint16, bitcast=True).to(tl.int64)
    else:
        return x.to(TYPE).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def pack_tiles(tiles, N: tl.constexpr, PACK: tl.constexpr, TYPE: tl.constexpr):
    """N tiles as words of PACK of them; with PACK 1, the tiles in TYPE."""
    words = ()
    for w in tl.static_range((N + PACK - 1) // PACK):
        if PACK == 1:
            words = words + (tiles[w].to(TYPE),)
        else:
            word = _bits(tiles[w * PACK], TYPE)
            for k in tl.static_range(1, PACK):
                if w * PACK + k < N:
                    word = word | (_bits(tiles[w * PACK + k], TYPE) << (k * TYPE.primitive_bitwidth))
            words = words + (word,)
    return words


@triton.jit
def unpack_tiles(words, N: tl.constexpr, PACK: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr):
    """The N tiles of the words, in ACC."""
    tiles = ()
    for n in tl.static_range(N):
        if PACK == 1:
            tiles = tiles + (words[n].to(ACC),)
        elif TYPE.primitive_bitwidth == 16:
            bits = (words[n // PACK] >> (n % PACK * 16)).to(tl.uint16)
            tiles = tiles + (bits.to(TYPE, bitcast=True).to(ACC),)
        else:
            bits = (words[n // PACK] >> (n % PACK * 32)).to(tl.uint32)
            tiles = tiles + (bits.to(TYPE, bitcast=True).to(ACC),)
    return tiles
