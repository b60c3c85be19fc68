"""What the layers of a stack tell each other during one launch (see `stack`): tiles that are their own flags.

Layers run at the same time, each a few steps behind the one before it: forward the one below, backward the one above. A
program of a layer takes the steps for its rows, and a program between two layers multiplies with the upper one's input
weights: forward the lower one's output, backward the gradient of the upper one's gx. Both read what another program
stores, as 32-bit words: a float32, or two neighbours of 16 bits. All words are filled before the launch with ones, a
NaN (or two) that no arithmetic yields; if a word should be that all the same, another NaN is stored. Who needs a word
loads it until it is not all ones. Each word tells of itself alone, so the order in which stores arrive does not matter;
it is stored and loaded by one strong instruction, so none is half there; and it is stored once a launch, so none is
stale. A word is loaded a step ahead: a layer that has to wait falls behind by as much, and from then on finds its words
there.

No program waits for one behind it, and the launch is cooperative: all of them run. Interpreted, programs run one after
the other, in the order in which they wait, and nobody has to.
"""

import triton
import triton.language as tl

from .layout import (
    arrived,
    in_layout_of,
    in_memory,
    in_order,
    load_weights,
    memory_rows,
    memory_units,
    readable,
    tile_words,
    unit_order,
)
from .math import INTERPRETED
from .tiles import inside, load_tiles, operands, products, sum_products


@triton.constexpr_function
def _per_word(dtype):
    """How many elements a word has."""
    return 32 // dtype.primitive_bitwidth


@triton.jit
def word_ptr(ptr):
    """A pointer to elements, as one to words."""
    return ptr.to(tl.pointer_type(tl.int32))


@triton.jit
def load_words(ptr, offsets, N: tl.constexpr, STRIDE: tl.constexpr):
    """What `complete_words` takes, of N tiles that are STRIDE words apart. ptr, offsets: of words."""
    tiles = ()
    for n in tl.static_range(N):
        tiles = tiles + (in_order(tl.load(ptr + in_order(offsets) + n * STRIDE, volatile=True)),)
    return tiles


@triton.constexpr_function
def _complete_text(n, each, stride):
    """PTX that loads n * each words again until none is all ones, and its constraints. Operands: the words out and in,
    each words of a tile together, of tiles stride bytes apart; each times the first tile's address, the word's offset
    in words, and -1, or 0 to take them as they are."""
    words, address = n * each, 2 * n * each
    most = ["mov.b32 %most, $0;", *(f"max.u32 %most, %most, ${word};" for word in range(1, words))]
    lines = ["{ .reg .pred %wait; .reg .b32 %most; .reg .b64 %at<" + f"{each}>;"]
    lines += [*(f"mov.b32 ${word}, ${words + word};" for word in range(words)), *most]
    lines += [f"and.b32 %most, %most, ${address + 2 * each};", "setp.eq.s32 %wait, %most, -1;"]
    lines += ["@!%wait bra done_${:uid};"]
    for word in range(each):
        lines += [f"mul.wide.s32 %at{word}, ${address + each + word}, 4;", f"add.s64 %at{word}, %at{word}, ${address};"]
    lines += ["again_${:uid}:"]
    for word in range(words):
        lines += [f"ld.relaxed.gpu.global.b32 ${word}, [%at{word % each} + {word // each * stride}];"]
    lines += [*most, "setp.eq.s32 %wait, %most, -1;", "@%wait bra again_${:uid};", "done_${:uid}: }"]
    return "\n".join(lines), ",".join(["=&r"] * words + ["r"] * words + ["l"] * each + ["r"] * (2 * each))


@triton.constexpr_function
def _of_elements(shape, per_word):
    """The shape of a tile of elements, from that of their words."""
    return (*shape[:4], shape[4] * per_word)


@triton.constexpr_function
def _of_words(n):
    """The types of n words."""
    return (tl.int32,) * n


@triton.constexpr_function
def _each(shape):
    """How many words of a tile a thread has."""
    return shape[0] * shape[1] * shape[2] * shape[3] * shape[4] // (32 * (shape[2] // 8))


@triton.jit
def complete_words(tiles, ptr, offsets, N: tl.constexpr, STRIDE: tl.constexpr, waits):
    """The tiles that `load_words` loaded from there, once all their words are stored. If waits is false, they are."""
    if INTERPRETED:
        return tiles
    else:
        EACH: tl.constexpr = _each(offsets.shape)
        TEXT: tl.constexpr = _complete_text(N, EACH, STRIDE * 4)
        look = tl.where(waits, -1, 0).to(tl.int32)
        given = tiles + (ptr.to(tl.int64), offsets, look)
        return tl.inline_asm_elementwise(TEXT[0], TEXT[1], given, dtype=_of_words(N), is_pure=False, pack=EACH)


@triton.jit
def load_input(ptr, offsets, G: tl.constexpr, H: tl.constexpr):
    """What `complete_input` takes, of a step's input. offsets: of words."""
    return load_words(word_ptr(ptr), offsets, G, H // _per_word(ptr.dtype.element_ty))


@triton.jit
def complete_input(loaded, ptr, offsets, G: tl.constexpr, H: tl.constexpr, waits):
    """What `load_input` loaded from there, for `arrived`. waits: it comes from another program."""
    return complete_words(loaded, word_ptr(ptr), offsets, G, H // _per_word(ptr.dtype.element_ty), waits)


@triton.constexpr_function
def _store_text(dtype):
    """PTX that stores a word made of one float32, or of two as halves of the dtype, and its constraints. Operands:
    nothing; the values; the address, an offset in words, whether to. A half that is a NaN is never all ones."""
    kind = {"bf16": "bf16x2", "fp16": "f16x2"}.get(dtype.name)
    at = 3 if kind else 2
    word = f"cvt.rn.{kind}.f32 %word, $2, $1;" if kind else "min.u32 %word, $1, -2;"
    text = "{ .reg .pred %there; .reg .b32 %word; .reg .b64 %at;\n" + word
    text += f"\nsetp.ne.s32 %there, ${at + 2}, 0;\nmul.wide.s32 %at, ${at + 1}, 4;\nadd.s64 %at, %at, ${at};\n"
    return text + "@%there st.relaxed.gpu.global.b32 [%at], %word;\nmov.b32 $0, 0; }", ",".join(
        ["=r"] + ["r"] * (at - 1) + ["l", "r", "r"]
    )


@triton.jit
def store_words(ptr, offsets, mask, tiles, N: tl.constexpr, STRIDE: tl.constexpr, TYPE: tl.constexpr):
    """Store N tiles, float32, as TYPE for `complete_words`, STRIDE words apart. offsets, mask: of words."""
    SHAPE: tl.constexpr = _of_elements(offsets.shape, _per_word(TYPE))
    TEXT: tl.constexpr = _store_text(TYPE)
    for n in tl.static_range(N):
        tile = in_memory(tiles[n], SHAPE)
        if INTERPRETED:
            words = tile_words(tile.to(TYPE))
            tl.store(ptr + in_order(offsets) + n * STRIDE, in_order(tl.where(words == -1, -2, words)), in_order(mask))
        else:
            values = (tile,)
            if TYPE.primitive_bitwidth == 16:
                values = tl.split(tl.reshape(tile, offsets.shape + [2]))
            given = values + ((ptr + n * STRIDE).to(tl.int64), offsets, mask.to(tl.int32))
            tl.inline_asm_elementwise(TEXT[0], TEXT[1], given, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def places(
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, W: tl.constexpr, B, row0, WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """Of a tile's words, in rows of WIDTH elements: the offsets to load from (`readable` units, rows that exist), those
    to store to, and which exist."""
    PER: tl.constexpr = _per_word(TYPE)
    units = memory_units(H // PER, BLOCK_H // PER, W, 4)
    rows = memory_rows(BLOCK_B)
    from_rows = tl.minimum(rows, B - 1 - row0).to(tl.int32)
    mask = (units < H // PER) & (rows < B - row0)
    load_from = from_rows * (WIDTH // PER) + readable(units, H // PER)
    return load_from, rows * (WIDTH // PER) + units, mask


@triton.jit
def project(
    from_ptr, w_ptr, b_ptr, to_ptr, T, B, row0, advance,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, ACC: tl.constexpr, G: tl.constexpr,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, W: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """The products between two layers with the upper one's input weights w [G*H, H], for BLOCK_B rows from row0 on.

    Forward: from the lower layer's y [T, B, H] the upper one's gx [T, B, G*H], with the biases b [G*H] (or None).
    Backward: from the upper layer's dgx the lower one's dy. The pointers are at the first step taken; advance: from
    there to the next, in elements of y.
    """
    TYPE: tl.constexpr = to_ptr.dtype.element_ty
    PER: tl.constexpr = _per_word(TYPE)
    IN: tl.constexpr = G if BACKWARD else 1
    OUT: tl.constexpr = 1 if BACKWARD else G
    units = unit_order(BLOCK_H, W)
    if IN_REGISTERS:
        weights = load_weights(w_ptr, G, H, BLOCK_H, W, BACKWARD)
    else:
        square = units[:, None] * H + units[None, :]
        if BACKWARD:
            square = units[None, :] * H + units[:, None]
        weights = load_tiles(w_ptr, square, (units[:, None] < H) & (units[None, :] < H), G, H * H, TYPE)
    weights = operands(weights, G, TYPE, PRECISION)
    zero = tl.zeros([BLOCK_H, BLOCK_B], ACC)
    start = ()
    for n in tl.static_range(OUT):
        if b_ptr is None:
            start = start + (zero,)
        else:
            bias = tl.load(b_ptr + n * H + units, mask=units < H, other=0.0).to(ACC)
            start = start + (zero + bias[:, None],)
    at_from, _, _ = places(H, BLOCK_H, BLOCK_B, W, B, row0, IN * H, TYPE)
    _, at_to, mask = places(H, BLOCK_H, BLOCK_B, W, B, row0, OUT * H, TYPE)
    from_ptr = word_ptr(from_ptr + row0 * (IN * H))
    to_ptr = word_ptr(to_ptr + row0 * (OUT * H))
    advance = advance // PER
    loaded = load_words(from_ptr, at_from, IN, H // PER)
    like = start[0]
    for t in range(T):
        words = complete_words(loaded, from_ptr, at_from, IN, H // PER, True)
        from_ptr += tl.where(t + 1 < T, advance * IN, 0)
        loaded = load_words(from_ptr, at_from, IN, H // PER)
        tiles = arrived(words, IN, TYPE, ACC)
        read = ()
        for n in tl.static_range(IN):
            # In the layout of a product's result, from which its operand is made as in a step.
            x = in_layout_of(like, tiles[n].to(tl.int32, bitcast=True)).to(ACC, bitcast=True)
            read = read + (inside(x, units, H, TYPE, FAST),)
        if BACKWARD:
            read = operands(read, IN, TYPE, PRECISION)
            out = (sum_products(weights, read, zero, zero, 0, IN, 0, PRECISION),)
        else:
            out = products(weights, read[0], start, 0, OUT, PRECISION)
        store_words(to_ptr, at_to, mask, out, OUT, H // PER, TYPE)
        to_ptr += advance * OUT
        like = out[0]
