"""What programs tell each other during a launch: that they have stored something (a barrier, see `grid`), and means
over units that are spread over programs.

A function of a cell calls `means`. Where a program has all units of a row, that is a sum. In `grid` each program stores
the sums of its own units, the programs meet at a barrier, and each adds up the sums of all, in the same order. Several
means that do not depend on each other are one exchange.

The sums have a place for each mean of a step, which the next step takes again. In between a program has arrived at
another barrier, for the operands, and it does that when it has read the sums. So none is overwritten too early. What
`grid` says of its values holds for the sums: they are stored before the block barrier of `arrive`, and read from L2.

Values that are their own flags: where y is all that programs of `grid` read from each other, forward needs no fence.
All of y but the first row is filled before the launch with elements of which all bits are ones, a NaN that no
arithmetic yields; if a value should be that all the same, `store_flagged` stores another NaN. Who needs an element
loads it until it is not all ones (`complete`). Every element tells of itself alone, so the order in which stores arrive
does not matter; each is stored and loaded by one strong instruction, so none is half there; and each is stored once a
launch, so none is stale. The row that a launch starts from is taken as it is. To poll a small y costs little (FLAGGED
2). A larger one would keep the second-level cache busy: there a counter is polled first, which says that the values
will be there soon (FLAGGED 1).

Interpreted, a launch is one program after the other, and nobody can wait. A part of a step is then launched once more
for each exchange: `done` says how many of the step's exchanges have all their sums. Beyond those a program goes on with
its own sums, as if they were all; what it stores then is replaced by the last of these launches.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .math import INTERPRETED
from .plan import chunks, parts, slices

if TYPE_CHECKING:
    from .form import Form
    from .plan import Plan

# Bytes of y that all programs of a batch tile may read from L2 at each poll.
_READ_AT_EACH_POLL = 128 << 10


@lru_cache(maxsize=1024)
def flagged(cell: "Form", plan: "Plan", hidden: int, itemsize: int) -> int:
    """How forward by `grid` waits for y. 0: at a barrier. 1, 2: its values are their own flags; with 1 a counter is
    polled first. Only where y is all that programs read from each other, and each thread reads all of its part at once,
    16 bytes at a time. From Ampere on: before, there is no greatest that is NaN where one is (`_find`)."""
    if plan.schedule != "grid" or plan.capability < 80 or len(cell.operands) != 1 or cell.published or cell.means:
        return 0
    ((rows, columns),) = slices(cell, hidden, plan.block_h, False)
    share = parts(rows, plan.block_b, plan.num_warps)
    whole = chunks(columns, 16 * share, plan.block_k)
    read = hidden * plan.block_b * itemsize
    # A thread of more than 64 bytes would wait for all of them where it now begins with the first.
    fits = share > 1 and plan.block_b <= 16 and len(whole) == 1 and read <= 64 * 32 * plan.num_warps
    if itemsize not in (2, 4) or hidden * itemsize % 16 or not fits:  # so that a run of 16 bytes is whole
        return 0
    return 2 if -(-hidden // plan.block_h) * read <= _READ_AT_EACH_POLL else 1


@triton.jit
def arrive(counter_ptr, FLAGGED: tl.constexpr = False):
    """Publish what this program has stored, and count it in. See `grid`. FLAGGED: it is counted in before it can be
    seen, since what others read tells whether it is there."""
    if FLAGGED:
        tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")
    else:
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target, PTX: tl.constexpr, FLAGGED: tl.constexpr = False):
    """Until the counter reaches target; then every load sees what was published. Returns the next target.
    FLAGGED: what the others published will be there soon (see `complete`)."""
    if PTX:  # every thread polls for itself: no block barrier, and nothing through shared memory
        ORDER: tl.constexpr = "relaxed" if FLAGGED else "acquire"
        tl.inline_asm_elementwise(
            "{ .reg .pred %early;\nagain_${:uid}:\nld." + ORDER + ".gpu.global.s32 $0, [$1];\n"
            "setp.lt.s32 %early, $0, $2;\n@%early bra again_${:uid}; }",
            "=&r,l,r", [counter_ptr.to(tl.int64), target], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:  # an atomic that adds nothing is the portable acquiring load
        while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
            pass
        tl.debug_barrier()
    return target + tl.num_programs(0)


@triton.constexpr_function
def _store_text(bits):
    """PTX that stores one value, and its constraints. Operands: nothing, address, the value's bits, whether to."""
    narrow, value = (".reg .b16 %half; cvt.u16.u32 %half, $2;", "%half") if bits == 16 else ("", "$2")
    text = f"{{ .reg .pred %there; {narrow}\nsetp.ne.s32 %there, $3, 0;\n"
    return text + f"@%there st.relaxed.gpu.global.b{bits} [$1], {value};\nmov.b32 $0, 0; }}", "=r,l,r,r"


@triton.jit
def store_flagged(ptr, offsets, tile, mask):
    """Store a tile for `complete`: no element is all ones, which of numbers is a NaN that no arithmetic yields."""
    x = tile.to(ptr.dtype.element_ty)
    if x.dtype.primitive_bitwidth == 16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -1, -2, bits)  # another NaN
    STORE: tl.constexpr = _store_text(x.dtype.primitive_bitwidth)
    inputs = [(ptr + offsets).to(tl.int64), bits, mask.to(tl.int32)]
    tl.inline_asm_elementwise(STORE[0], STORE[1], inputs, dtype=tl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def _find(kind, words, most, look):
    """PTX: whether a NaN is among the words: a quick look, since all ones is one. Nothing is, if look is 0."""
    lines = [f"mov.b32 {most}{word}, ${word};" for word in range(words)]
    half = words // 2
    while half:
        lines += [f"max.NaN.{kind} {most}{word}, {most}{word}, {most}{word + half};" for word in range(half)]
        half //= 2
    lines += [f"and.b32 {most}0, {most}0, ${look};"]
    if kind == "f32":
        return [*lines, f"setp.num.f32 %there, {most}0, {most}0;"]
    # A half is a NaN if its bits but the sign are more than those of infinity.
    more = (0x7F81 if kind == "bf16x2" else 0x7C01) * 0x10001
    lines += [f"and.b32 {most}0, {most}0, 0x7FFF7FFF;", f"or.b32 {most}0, {most}0, 0x80008000;"]
    lines += [f"sub.s32 {most}0, {most}0, {more:#x};", f"and.b32 {most}0, {most}0, 0x80008000;"]
    return [*lines, f"setp.eq.s32 %there, {most}0, 0;"]


@triton.constexpr_function
def _find_all_ones(bits, words):
    """PTX: whether an element of the words is all ones."""
    lines = ["mov.b32 %all, 0;"]
    if bits == 32:
        return [*lines, *(f"max.u32 %all, %all, ${word};" for word in range(words)), "setp.ne.s32 %there, %all, -1;"]
    for word in range(words):  # a half of x is all ones where x has its top bit and ~x - 0x00010001 borrows into it
        lines += [f"sub.s32 %one, 0xFFFEFFFE, ${word};", f"and.b32 %one, %one, ${word};", "or.b32 %all, %all, %one;"]
    return [*lines, "and.b32 %all, %all, 0x80008000;", "setp.eq.s32 %there, %all, 0;"]


@triton.constexpr_function
def _load_again(n, run, bits, address, offset):
    """PTX that loads all elements again: 16 bytes at a time where a thread's registers have `run` neighbours in the
    order of the memory, as they should; else one by one."""
    per = 32 // bits
    lines = []
    for element in range(n):
        lines += [f"cvt.s64.s32 %at, ${offset + element};", f"add.s64 %at, %at, ${address + element};"]
        if bits == 32:
            lines.append(f"ld.relaxed.gpu.global.b32 ${element}, [%at];")
        elif element % 2 == 0:
            lines.append("ld.relaxed.gpu.global.b16 %low, [%at];")
        else:
            lines += ["ld.relaxed.gpu.global.b16 %high, [%at];", f"mov.b32 ${element // 2}, {{%low, %high}};"]
    lines += ["bra look_${:uid};", "wide_${:uid}:"]
    vector = {4: ".v4", 2: ".v2", 1: ""}[run // per]
    for first in range(0, n, run):
        words = ", ".join(f"${word}" for word in range(first // per, (first + run) // per))
        lines.append(f"ld.relaxed.gpu.global{vector}.b32 {{{words}}}, [${address + first}];")
    return [*lines, "bra look_${:uid};"]


@triton.constexpr_function
def _complete_text(n, run, dtype):
    """PTX that loads n elements again until none is all ones, and its constraints. Operands: the elements out and in,
    in registers of 32 bits; of each an address and an offset in bytes; n times -1, or 0 to take them as they are."""
    bits = dtype.primitive_bitwidth
    words = n * bits // 32
    kind = {"bf16": "bf16x2", "fp16": "f16x2", "fp32": "f32"}[dtype.name]
    address, offset, look = 2 * words, 2 * words + n, 2 * words + 2 * n
    lines = [f"{{ .reg .pred %there, %wide; .reg .b64 %at, %differ; .reg .b32 %all, %one; .reg .b32 %most<{words}>;"]
    if bits == 16:
        lines[0] += " .reg .b16 %low, %high;"
    lines += [f"mov.b32 ${word}, ${words + word};" for word in range(words)]
    lines += [*_find(kind, words, "%most", look), "@%there bra done_${:uid};", "mov.b64 %differ, 0;"]
    for element in range(n):
        first = element - element % run
        lines += [f"sub.s64 %at, ${address + element}, ${address + first};", "or.b64 %differ, %differ, %at;"]
        lines += [f"cvt.s64.s32 %at, ${offset + element};", f"sub.s64 %at, %at, {element % run * bits // 8};"]
        lines += ["or.b64 %differ, %differ, %at;"]
    lines += ["setp.eq.s64 %wide, %differ, 0;", "look_${:uid}:", *_find_all_ones(bits, words)]
    lines += ["@%there bra done_${:uid};", "@%wide bra wide_${:uid};"]
    lines += [*_load_again(n, run, bits, address, offset), "done_${:uid}: }"]
    return "\n".join(lines), ",".join(["=&r"] * words + ["r"] * words + ["l"] * n + ["r"] * (2 * n))


@triton.jit
def complete(x, ptr, offsets, more, again, N: tl.constexpr, RUN: tl.constexpr):
    """x, which was loaded of ptr + offsets + more, once all its elements have been stored by `store_flagged`. N: how
    many a thread has, of which RUN that differ only in more are neighbours. If again is false, they have been
    stored."""
    TEXT: tl.constexpr = _complete_text(N, RUN, x.dtype)
    look = tl.where(again, -1, 0).to(tl.int32)
    address = (ptr + offsets).to(tl.int64)
    return tl.inline_asm_elementwise(
        TEXT[0], TEXT[1], [x, address, more * (x.dtype.primitive_bitwidth // 8), look], dtype=x.dtype, is_pure=False,
        pack=N,
    )  # fmt: skip


@triton.constexpr_function
def exchanges_before(means, n):
    """How many exchanges the functions before the n-th have. means: for each function the means of each exchange."""
    return sum(len(sizes) for sizes in means[:n])


@triton.constexpr_function
def means_before(means, n):
    """How many means they have."""
    return sum(sum(sizes) for sizes in means[:n])


@triton.jit
def shares(units, H: tl.constexpr, ACC: tl.constexpr):
    """What a function takes for `means` as the last of its params, where a program has all units: a tuple of one tile
    [units, 1], 1/H of the units that exist and 0 beyond H."""
    return ((tl.where(units < H, tl.full([1], 1, ACC) / H, 0.0)[:, None],),)


@triton.jit
def spread(
    units, sums_ptr, counter_ptr, MEANS: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """What `of_function` takes in `grid`; empty if the cell takes no means.

    sums_ptr [groups, batch tiles, means, programs, rows]; counter_ptr [2 * groups * batch tiles]: the second half
    counts arrivals of these exchanges alone.
    """
    if len(MEANS) == 0:
        return ()
    else:
        PROGRAMS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
        place = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        counter_ptr += tl.num_programs(1) * tl.num_programs(2) + place
        sums_ptr += place * (means_before(MEANS, 3) * PROGRAMS * BLOCK_B)
        return (shares(units, H, ACC)[0][0], sums_ptr, counter_ptr, tl.arange(0, triton.next_power_of_2(PROGRAMS)))


@triton.jit
def of_function(spread, done, MEANS: tl.constexpr, N: tl.constexpr, BLOCK_B: tl.constexpr):
    """`shares`, for the N-th of a direction's three functions in `grid`. done: compiled, the exchanges that the launch
    had before this step; interpreted, see the module's docstring."""
    if len(MEANS) == 0:
        return ()
    else:
        share, sums_ptr, counter_ptr, programs = spread
        sums_ptr += means_before(MEANS, N) * (tl.num_programs(0) * BLOCK_B)
        BEFORE: tl.constexpr = exchanges_before(MEANS, N)
        done = done - BEFORE if INTERPRETED else done + BEFORE
        return ((share, sums_ptr, counter_ptr, done, programs),)


@triton.jit
def _add_2(a, b, x, y):
    return a + x, b + y


@triton.jit
def _add_3(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def _add_4(a, b, c, d, x, y, z, w):
    return a + x, b + y, c + z, d + w


@triton.jit
def _sums(tiles, share):
    """Of each tile the sum of its units' shares, [1, rows]. Two to four take one trip through shared memory."""
    parts = ()
    for n in tl.static_range(len(tiles)):  # units beyond H may be anything
        parts = parts + (tl.where(share > 0, tiles[n] * share, 0.0),)
    if len(tiles) == 2 and not INTERPRETED:
        return tl.reduce(parts, 0, _add_2, keep_dims=True)
    elif len(tiles) == 3 and not INTERPRETED:
        return tl.reduce(parts, 0, _add_3, keep_dims=True)
    elif len(tiles) == 4 and not INTERPRETED:
        return tl.reduce(parts, 0, _add_4, keep_dims=True)
    else:
        sums = ()
        for n in tl.static_range(len(tiles)):
            sums = sums + (tl.sum(parts[n], 0, keep_dims=True),)
        return sums


@triton.jit
def means(tiles, given, BEFORE: tl.constexpr, AT: tl.constexpr):
    """The means of tiles over their units, as a tuple of tiles [1, rows]. given: the last of a function's params.
    BEFORE: how many means the function took before these; AT: how many exchanges it had."""
    sums = _sums(tiles, given[0])
    if len(given) == 1:
        return sums
    else:
        _, sums_ptr, counter_ptr, done, program = given
        rows = tl.arange(0, sums[0].shape[1])[None, :]
        count = tl.num_programs(0)
        sums_ptr += BEFORE * count * rows.shape[1]
        for n in tl.static_range(len(tiles)):
            tl.store(sums_ptr + (n * count + tl.program_id(0)) * rows.shape[1] + rows, sums[n])
        if not INTERPRETED:
            arrive(counter_ptr)
            wait(counter_ptr, (done + AT + 1) * count, True)
        every = ()
        at = program[:, None] * rows.shape[1] + rows
        for n in tl.static_range(len(tiles)):
            of_mean = sums_ptr + n * count * rows.shape[1]
            every = every + (tl.load(of_mean + at, mask=(program < count)[:, None], other=0.0, cache_modifier=".cg"),)
        out = ()
        for n in tl.static_range(len(tiles)):
            total = tl.sum(every[n], 0, keep_dims=True)
            if INTERPRETED:
                total = tl.where(done > AT, total, sums[n])
            out = out + (total,)
        return out
