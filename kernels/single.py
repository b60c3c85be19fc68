"""Schedule `single`: one step, both its products, its biases and its saving for backward, in one launch.

For the cells (LSTMCell and the others), whose every call is one step. `scan` has the input projection of all steps from
one GEMM and then takes them in turn; for one step that is a GEMM, a launch and the copies around them, and at a small
batch the launches dominate. Here a program owns BLOCK_H units of BLOCK_B rows with all their gates, and reads its rows
of both matrices once, W's and then U's, in one pipelined loop.

Few rows are the tensor cores' work as well, padded to eight: multiplied as vectors on the other units, even one row of
bfloat16 takes more issue slots (tried, compiled for sm_90).

Shapes: x [B, I], W [G*H, I], U [products*H, H], b_ih [G*H], b_hh [products*H], params [P*H], h0, hn [B, H], c0, cn
[B, (S-1)*H] (see `form`). With SAVE the buffers of a scan over one step of one group (see `resident`) in memory's
order: y, c [2, B, .], before and after the step; saved [B, W, H]. Any of b_ih, b_hh, h0, c0 may be None: zero (and
where the state that U multiplies is, there is no product with U).

Slots: a program's rows of the matrices are unit * SLOTS + slot (see `tiles.gate_rows`). The first G slots are those of
the tiles of gx: W's rows, and with them U's of the product that only adds to that tile. A product that is apart (the
GRU's third) has a slot behind them, where the power of two leaves room.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import Cell
from .math import operand, product
from .plan_single import Single, parts, slots
from .scan import ACCUMULATE, Launch, Scanned, _per_scan, aligned, allocate_saved, run
from .tiles import (
    apart_before,
    load_params,
    load_tiles,
    pack_tiles,
    split_gates,
    store_tiles,
    zeros,
)


@triton.jit
def _of_both(first, second, IN_SECOND, BOTH: tl.constexpr):
    """first; or second, if BOTH are taken and IN_SECOND."""
    if BOTH:
        return tl.where(IN_SECOND, second, first)
    else:
        return first


@triton.jit
def _product_of_columns(
    acc, w_ptr, w_rows, w_valid, x_ptr, u_ptr, u_rows, u_valid, h_ptr, row, row_mask, I: tl.constexpr,  # noqa: E741
    H: tl.constexpr, X_STRIDE: tl.constexpr, H_STRIDE: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    BOTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + W x, and if BOTH + U h behind it in the same loop: the second's first tiles are on their way before the
    first's last are used. w_rows, u_rows: the row of the matrix in each slot. Rows of x and h are I and H long, and
    X_STRIDE and H_STRIDE apart."""
    PART: tl.constexpr = BLOCK_K // PARTS
    TILES: tl.constexpr = (I + BLOCK_K - 1) // BLOCK_K
    SECOND: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K if BOTH else 0
    WHOLE: tl.constexpr = I % BLOCK_K == 0 and (not BOTH or H % BLOCK_K == 0)
    if PARTS == 1:
        k = tl.arange(0, BLOCK_K)[None, :]
    else:
        k = tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
    for i in range(TILES + SECOND):
        there = i >= TILES
        ks = k + (i - _of_both(0, TILES, there, BOTH)) * BLOCK_K
        width = _of_both(I, H, there, BOTH and I != H)
        stride = _of_both(X_STRIDE, H_STRIDE, there, BOTH and X_STRIDE != H_STRIDE)
        weights = _of_both(w_ptr, u_ptr, there, BOTH)
        vectors = _of_both(x_ptr, h_ptr, there, BOTH)
        rows = _of_both(w_rows, u_rows, there, BOTH)
        valid = _of_both(w_valid, u_valid, there, BOTH)
        if PARTS == 1:
            mask = valid[:, None] if WHOLE else valid[:, None] & (ks < width)
            w = tl.load(weights + rows[:, None] * width + ks, mask=mask, other=0.0)
            down = tl.trans(ks)
            mask = row_mask[None, :] if WHOLE else row_mask[None, :] & (down < width)
            x = tl.load(vectors + row[None, :] * stride + down, mask=mask, other=0.0)
            acc = product(operand(w, w.dtype, PRECISION), operand(x, w.dtype, PRECISION), acc, PRECISION)
        else:
            mask = valid[None, :, None] if WHOLE else valid[None, :, None] & (ks < width)
            w = tl.load(weights + rows[None, :, None] * width + ks, mask=mask, other=0.0)
            down = tl.permute(ks, (0, 2, 1))
            mask = row_mask[None, None, :] if WHOLE else row_mask[None, None, :] & (down < width)
            x = tl.load(vectors + row[None, None, :] * stride + down, mask=mask, other=0.0)
            acc = product(operand(w, w.dtype, PRECISION), operand(x, w.dtype, PRECISION), acc, PRECISION)
    return acc


@triton.jit
def _add_bias(bias_ptr, units, tile, H: tl.constexpr, N: tl.constexpr):
    """tile + the N-th bias."""
    if bias_ptr is None:
        return tile
    else:
        return tile + tl.load(bias_ptr + N * H + units, mask=units < H, other=0.0).to(tile.dtype)[:, None]


@triton.constexpr_function
def _product_in(slot, tiles, adds):
    """The product in a slot; -1 if there is none."""
    if slot < tiles:
        return adds.index(slot) if slot in adds else -1
    apart = [n for n, tile in enumerate(adds) if tile < 0]
    return apart[slot - tiles] if slot < tiles + len(apart) else -1


@triton.constexpr_function
def _slot_of(product, tiles, adds):
    """Where a product that is apart is."""
    return tiles + sum(tile < 0 for tile in adds[:product])


@triton.jit(do_not_specialize=["B"])
def kernel(
    x_ptr, w_ptr, u_ptr, b_ih_ptr, b_hh_ptr, params_ptr, h0_ptr, c0_ptr, y_ptr, c_ptr, saved_ptr, hn_ptr, cn_ptr, B,
    I: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,  # noqa: E741
    BLOCK_K: tl.constexpr, PARTS: tl.constexpr, FUSED: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, ADDS: tl.constexpr, OPERAND: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr,
    PARAMS: tl.constexpr, PACK: tl.constexpr, SAVE: tl.constexpr, STEP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The step. OPERAND: the state that U multiplies; -1: there is no U. FUSED: both products in one loop; else one
    after the other."""
    SLOTS: tl.constexpr = triton.next_power_of_2(G + apart_before(ADDS, len(ADDS)))
    unit0 = tl.program_id(0) * BLOCK_H
    units = unit0 + tl.arange(0, BLOCK_H)
    row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_mask = row < B
    mask = (units[:, None] < H) & row_mask[None, :]
    at_h = (row * H)[None, :] + units[:, None]
    at_c = (row * ((STATES - 1) * H))[None, :] + units[:, None]

    zero = tl.zeros([BLOCK_H, BLOCK_B], ACC)
    states = (zero,)
    if h0_ptr is not None:
        states = load_tiles(h0_ptr, at_h, mask, 1, 0, ACC)
    if STATES > 1:
        others = zeros(STATES - 1, BLOCK_H, BLOCK_B, ACC)
        if c0_ptr is not None:
            others = load_tiles(c0_ptr, at_c, mask, STATES - 1, H, ACC)
        states = states + others

    m = tl.arange(0, BLOCK_H * SLOTS)
    unit, slot = unit0 + m // SLOTS, m % SLOTS
    w_rows, w_valid = slot * H + unit, (unit < H) & (slot < G)
    of_slot, u_valid = slot, unit < H
    for n in tl.static_range(SLOTS):
        if _product_in(n, G, ADDS) < 0:
            u_valid = u_valid & (slot != n)
        elif _product_in(n, G, ADDS) != n:
            of_slot = tl.where(slot == n, _product_in(n, G, ADDS), of_slot)
    u_rows = of_slot * H + unit
    if PARTS == 1:  # noqa: SIM108  (the compiler needs the two shapes apart)
        acc = tl.zeros([BLOCK_H * SLOTS, BLOCK_B], ACC)
    else:
        acc = tl.zeros([PARTS, BLOCK_H * SLOTS, BLOCK_B], ACC)
    # The vectors that U multiplies, and how far apart they are.
    OF_C: tl.constexpr = OPERAND > 0
    h_ptr = None
    if OF_C:
        if c0_ptr is not None:
            h_ptr = c0_ptr + (OPERAND - 1) * H
    elif OPERAND == 0:
        h_ptr = h0_ptr
    H_STRIDE: tl.constexpr = (STATES - 1) * H if OF_C else H
    BOTH: tl.constexpr = FUSED and h_ptr is not None
    acc = _product_of_columns(
        acc, w_ptr, w_rows, w_valid, x_ptr, u_ptr, u_rows, u_valid, h_ptr, row, row_mask,
        I, H, I, H_STRIDE, BLOCK_K, PARTS, BOTH, INPUT_PRECISION,
    )  # fmt: skip
    if h_ptr is not None and not FUSED:
        acc = _product_of_columns(
            acc, u_ptr, u_rows, u_valid, h_ptr, u_ptr, u_rows, u_valid, h_ptr, row, row_mask,
            H, H, H_STRIDE, H_STRIDE, BLOCK_K, PARTS, False, PRECISION,
        )  # fmt: skip
    if PARTS > 1:
        acc = tl.sum(acc, 0)
    sums = split_gates(acc, SLOTS, SLOTS, BLOCK_H, BLOCK_B)

    gx, hu = (), ()
    for n in tl.static_range(G):
        with_w = _add_bias(b_ih_ptr, units, sums[n], H, n)
        if _product_in(n, G, ADDS) >= 0:
            with_w = _add_bias(b_hh_ptr, units, with_w, H, _product_in(n, G, ADDS))
        gx = gx + (with_w,)
    for n in tl.static_range(len(ADDS)):
        if ADDS[n] >= 0:  # noqa: SIM108  (Triton takes one of two expressions for the other's type, too)
            hu = hu + (zero,)
        else:
            hu = hu + (_add_bias(b_hh_ptr, units, sums[_slot_of(n, G, ADDS)], H, n),)
    params = load_params(params_ptr, units, PARAMS, H, ACC)
    new, saved = STEP(gx, hu, states, params, FAST)

    store_tiles(hn_ptr, at_h, mask, new, 0, 1, 0)
    if STATES > 1:
        store_tiles(cn_ptr, at_c, mask, new, 1, STATES, H)
    if SAVE:
        after = B.to(tl.int64) * H
        store_tiles(y_ptr, at_h, mask, states, 0, 1, 0)
        store_tiles(y_ptr + after, at_h, mask, new, 0, 1, 0)
        if STATES > 1:
            store_tiles(c_ptr, at_c, mask, states, 1, STATES, H)
            store_tiles(c_ptr + after * (STATES - 1), at_c, mask, new, 1, STATES, H)
    if SAVED > 0:
        SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
        WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
        at_s = (row * (WORDS * H))[None, :] + units[:, None]
        words = pack_tiles(saved, SAVED, SAVED_PACK, hn_ptr.dtype.element_ty)
        store_tiles(saved_ptr, at_s, mask, words, 0, WORDS, H)


SAVES = ("none", "gates")


def allocate(cell: Cell, x: Tensor, H: int, save: str) -> Scanned:
    """The uninitialised outputs of `forward`: `scan.allocate`'s for one step, but hn and cn [B, .].

    With save="none" these only.
    """
    B, others, saves = x.shape[0], (cell.states - 1) * H, save == "gates"
    return Scanned(
        x.new_empty(2, B, 1, H) if saves else x.new_empty(0),
        x.new_empty(2, B, 1, others) if saves and others else x.new_empty(0),
        # Only the shape of gx is used.
        allocate_saved(cell, x.new_empty(1).expand(1, B, 1, cell.gates * H)) if saves else x.new_empty(0),
        x.new_empty(B, H),
        x.new_empty(B, others) if others else x.new_empty(0),
    )


def forward(
    cell: Cell,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    *,
    save: str,
    plan: Single,
    params: Tensor | None = None,
    precision: str = "ieee",
    input_precision: str | None = None,
    launch: Callable[[Launch], None] = run,
) -> Scanned:
    """One step from the layer's input: what `scan.forward` returns for one step of one group, but hn and cn [B, .].

    x [B, I], w_ih [G*H, I], w_hh [products*H, H] and b_hh [products*H] in the kernels' order, b_ih [G*H], h0 [B, H],
    c0 [B, (S-1)*H] (None: zero), params [P*H].
    save: "none" returns hn and cn only; "gates" also what backward needs.
    precision, input_precision: tl.dot's input_precision with U and with W (None: the same), for float32.
    """
    if save not in SAVES:
        raise ValueError(f"unknown save {save!r}: expected one of {', '.join(SAVES)}")
    (B, I), H = x.shape, w_hh.shape[1]  # noqa: E741
    out = allocate(cell, x, H, save)
    through = input_precision or precision
    x, w_ih, w_hh, b_ih, b_hh, params, h0, c0 = aligned(x, w_ih, w_hh, b_ih, b_hh, params, h0, c0)
    arguments = {
        "x_ptr": x, "w_ptr": w_ih, "u_ptr": w_hh, "b_ih_ptr": b_ih, "b_hh_ptr": b_hh, "params_ptr": params,
        "h0_ptr": h0, "c0_ptr": c0 if cell.states > 1 else None, "y_ptr": out.y, "c_ptr": out.c, "saved_ptr": out.saved,
        "hn_ptr": out.hn, "cn_ptr": out.cn, "B": B, **_constants(cell, plan, I, H, x.dtype, through, precision, save),
    }  # fmt: skip
    launch(Launch(kernel, (-(-H // plan.block_h), -(-B // plan.block_b)), arguments, plan))
    return out


@_per_scan
def _constants(
    cell: Cell,
    plan: Single,
    I: int,  # noqa: E741
    H: int,
    dtype: torch.dtype,
    input_precision: str,
    precision: str,
    save: str,
) -> dict[str, object]:
    """What the kernel is compiled for."""
    size, saved = dtype.itemsize, save == "gates"
    # In one loop, rows of different alignment would both be loaded with the smaller one.
    fused = input_precision == precision and gcd(I * size, 16) == gcd(H * size, 16)
    constants = {"I": I, "H": H, "BLOCK_H": plan.block_h, "BLOCK_B": plan.block_b, "BLOCK_K": plan.block_k}
    constants |= {"FUSED": fused, "ACC": ACCUMULATE[dtype], "INPUT_PRECISION": input_precision, "PRECISION": precision}
    constants |= {"G": cell.gates, "ADDS": cell.adds, "OPERAND": cell.operands[0].state if cell.operands else -1}
    constants |= {"STATES": cell.states, "PARAMS": cell.params, "STEP": cell.forward}
    constants |= {"SAVE": saved, "SAVED": cell.saved if saved else 0, "PACK": 8 // size}
    constants["PARTS"] = parts(plan.block_h * slots(cell))
    constants["FAST"] = dtype in (torch.float16, torch.bfloat16) and plan.capability > 0
    return constants
