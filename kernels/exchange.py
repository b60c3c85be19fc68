"""What programs tell each other during a launch: that they have stored something (a barrier, see `grid`), and means
over units that are spread over programs.

A function of a cell calls `means`. Where a program has all units of a row, that is a sum. In `grid` each program stores
the sums of its own units, the programs meet at a barrier, and each adds up the sums of all, in the same order. Several
means that do not depend on each other are one exchange.

The sums have a place for each mean of a step, which the next step takes again. In between a program has arrived at
another barrier, for the operands, and it does that when it has read the sums. So none is overwritten too early. What
`grid` says of its values holds for the sums: they are stored before the block barrier of `arrive`, and read from L2.

Interpreted, a launch is one program after the other, and nobody can wait. A part of a step is then launched once more
for each exchange: `done` says how many of the step's exchanges have all their sums. Beyond those a program goes on with
its own sums, as if they were all; what it stores then is replaced by the last of these launches.
"""

import triton
import triton.language as tl

from .math import INTERPRETED


@triton.jit
def arrive(counter_ptr):
    """Publish what this program has stored, and count it in. See `grid`."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target, PTX: tl.constexpr):
    """Until the counter reaches target; then every load sees what was published. Returns the next target."""
    if PTX:  # every thread polls for itself: no block barrier, and nothing through shared memory
        tl.inline_asm_elementwise(
            "{ .reg .pred %early;\nagain_${:uid}:\nld.acquire.gpu.global.s32 $0, [$1];\n"
            "setp.lt.s32 %early, $0, $2;\n@%early bra again_${:uid}; }",
            "=&r,l,r", [counter_ptr.to(tl.int64), target], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:  # an atomic that adds nothing is the portable acquiring load
        while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
            pass
        tl.debug_barrier()
    return target + tl.num_programs(0)


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
