"""The cells of the loop engine: a step's torch operations, forward and backward, as few as possible.

On the CPU, the time of a small step is the overhead of calling its operations, so their number counts. They work in
place on columns of one buffer: one product fills all gates, and one sigmoid or one multiplication is applied to
neighbouring gates. What does not depend on a neighbouring step (`coefficients`) is done for many steps at once. The
formulas are in kernels/cells.

Rows are those of a `stretches.RowOrder`: step k has sizes[k] rows, a leading part of the rows of the step before. A
step forward works on a buffer x [rows, width*H]: the tiles of gx, and the products that are apart. A step backward
works on p [rows, gradient_width*H], the gradients of the same. A part of the engine, a class here or a
`derived.Generated`, has

    states, params   as `kernels.form.Form`
    saved            columns of what is saved for backward, in units of H
    width            columns of x in units of H; 0: the gate is the output itself, and its product is formed there
    saves_all        whether all of x is saved
    columns, apart   the columns in x of gx's tiles, and of the products apart
    zeroed           columns of x that are initialized to zero
    gradient_width   columns of p in units of H
    grads, apart_grads, param_grads    the columns in p of gx's tiles and of the products apart; the first parameter's
    rows             the products, in the order in which `products` returns their rows of the weights
    scratch_forward, scratch_backward    the number of scratch tensors [rows of a step, H]
    forward_weights(u), backward_weights(u)    the recurrent weights [products*H, H] in the form for forward and
                     activate, and in that for backward
    save(into, x, H) copies from x what is saved, if that is not all of x
    activate(x, h, c, u)    the gates of any number of rows at once, in place
    forward(sizes, x, h, c, y, cs, u, scratch)    steps in turn: y and cs (all c) are filled. Returns the last h and c
    coefficients(p, saved, h, c, y, after, params)    fills p with factors: each gate's gradient is its factor times a
                     gradient that backward has. h and c are the states before, y and after those after the step.
                     Returns what else backward needs of these rows
    backward(sizes, p, saved, others, grads, u, scratch)    steps backward: p becomes the gates' gradients. others: what
                     coefficients returned. grads: dh of each step; dc, that of c; what each step adds to it, or None;
                     and for each step the tensor to which the gradient of the step before is added
    products(p, others, h, c)    pairs (gates' gradients, operand) whose products are the recurrent weights' gradient,
                     one part of its rows after another

c are all states except the first, concatenated. u has the trained vectors after the weights, except in forward_weights
and backward_weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .stretches import by_step

Operands = Sequence[Tensor]
Sizes = Sequence[int]
Rest = Tensor | None  # c; None for a cell with one state
After = tuple[Tensor, Rest]
Grads = tuple[Sequence[Tensor], Tensor, "Sequence[Tensor] | None", Sequence[Tensor]]
_sigmoid_backward: Callable[..., Tensor] = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward: Callable[..., Tensor] = torch.ops.aten.tanh_backward.grad_input
_relu_backward: Callable[..., Tensor] = torch.ops.aten.threshold_backward.grad_input


def last_first(t: Tensor, H: int) -> Tensor:
    """The last gate's rows, then the others'."""
    return torch.cat([t[-H:], t[:-H]])


class Tuned:
    """The base class of the cells here: all of x is saved, and p has the same columns."""

    params, saves_all, scratch_forward, scratch_backward = 0, True, 1, 1
    zeroed: tuple[int, ...] = ()
    apart: tuple[int, ...] = ()
    apart_grads: tuple[int, ...] = ()
    states: int
    saved: int
    width: int
    gradient_width: int
    param_grads: int
    columns: tuple[int, ...]
    grads: tuple[int, ...]
    rows: tuple[int, ...]
    activate: Callable[..., None]
    forward: Callable[..., After]
    coefficients: Callable[..., Operands]
    backward: Callable[..., None]
    save: Callable[[Tensor, Tensor, int], None]

    @staticmethod
    def forward_weights(u: Tensor) -> Operands:
        return (u.t().contiguous(),)

    @staticmethod
    def backward_weights(u: Tensor) -> Operands:
        return (u,)

    @staticmethod
    def products(p: Tensor, others: Operands, h: Tensor, c: Rest) -> list[tuple[Tensor, Tensor]]:
        return [(p, h)]


class LSTM(Tuned):
    """x: o i f g. The three sigmoids are adjacent, and so are the three gates that c depends on."""

    states, saved, width, gradient_width, param_grads = 2, 4, 4, 4, 4
    columns = grads = (1, 2, 3, 0)
    rows = (3, 0, 1, 2)

    @staticmethod
    def forward_weights(u: Tensor) -> Operands:
        return (last_first(u, u.shape[1]).t().contiguous(),)

    @staticmethod
    def backward_weights(u: Tensor) -> Operands:
        return (last_first(u, u.shape[1]),)

    @staticmethod
    def activate(x: Tensor, h: Tensor, c: Tensor, u: Operands) -> None:
        H = h.shape[1]
        x.addmm_(h, u[0])
        x[:, : 3 * H].sigmoid_()
        x[:, 3 * H :].tanh_()

    @staticmethod
    def forward(
        sizes: Sizes, x: Tensor, h: Tensor, c: Tensor, y: Tensor, cs: Tensor, u: Operands, scratch: Tensor
    ) -> After:
        (operand,), rows = u, -1
        each = (x, x[:, : 3 * y.shape[1]], *x.chunk(4, 1), y, cs)
        for n, gates, sigmoids, o, i, f, g, out, after in zip(sizes, *(by_step(t, sizes) for t in each), strict=True):
            if n != rows:
                h, c, tc, rows = h[:n], c[:n], scratch[0, :n], n
            gates.addmm_(h, operand)
            sigmoids.sigmoid_()
            g.tanh_()
            torch.mul(f, c, out=after).addcmul_(i, g)
            torch.mul(o, torch.tanh(after, out=tc), out=out)
            h, c = out, after
        return h, c

    @staticmethod
    def coefficients(
        p: Tensor, saved: Tensor, h: Tensor, c: Tensor, y: Tensor, after: Tensor, params: Operands
    ) -> Operands:
        (o, i, f, g), (of_o, of_i, of_f, of_g) = saved.chunk(4, 1), p.chunk(4, 1)
        tc = torch.tanh(after)
        _sigmoid_backward(tc, o, grad_input=of_o)
        _sigmoid_backward(g, i, grad_input=of_i)
        _sigmoid_backward(c, f, grad_input=of_f)
        _tanh_backward(i, g, grad_input=of_g)
        return (torch.ops.aten.tanh_backward(o, tc),)

    @staticmethod
    def backward(
        sizes: Sizes, p: Tensor, saved: Tensor, others: Operands, grads: Grads, u: Operands, scratch: Tensor
    ) -> None:
        (operand,), (dh, dc, dcs, below) = u, grads
        H = dc.shape[1]
        each = (p, p[:, :H], p[:, H:].unflatten(1, (3, H)), others[0], saved[:, 2 * H : 3 * H])
        steps = list(zip(sizes, *(by_step(t, sizes) for t in each), dh, below, dcs or sizes, strict=True))
        of_c, rows = dc, -1
        for n, gates, of_o, of_cell, into_c, f, d, under, add in reversed(steps):
            if n != rows:
                of_c, rows = dc[:n], n
                spread = of_c[:, None]
            if dcs is not None:
                of_c.add_(add)
            of_c.addcmul_(d, into_c)
            of_cell.mul_(spread)
            of_o.mul_(d)
            under.addmm_(gates, operand)
            of_c.mul_(f)


class GRU(Tuned):
    """x: n r z q, where q is the inner product. The input's product fills n r z, and the recurrent one is added to
    r z q."""

    states, saved, width, gradient_width, param_grads = 1, 4, 4, 4, 4
    columns = grads = (1, 2, 0)
    apart, apart_grads, rows = (3,), (3,), (0, 1, 2)

    @staticmethod
    def activate(x: Tensor, h: Tensor, c: Rest, u: Operands) -> None:
        H = h.shape[1]
        x[:, H:].addmm_(h, u[0])
        x[:, H : 3 * H].sigmoid_()
        x[:, :H].addcmul_(x[:, H : 2 * H], x[:, 3 * H :]).tanh_()

    @staticmethod
    def forward(
        sizes: Sizes, x: Tensor, h: Tensor, c: Rest, y: Tensor, cs: Rest, u: Operands, scratch: Tensor
    ) -> After:
        (operand,), H, rows = u, y.shape[1], -1
        each = (x[:, H:], x[:, H : 3 * H], *x.chunk(4, 1), y)
        for m, gates, sigmoids, n, r, z, q, out in zip(sizes, *(by_step(t, sizes) for t in each), strict=True):
            if m != rows:
                h, rows = h[:m], m
            gates.addmm_(h, operand)
            sigmoids.sigmoid_()
            n.addcmul_(r, q).tanh_()
            h = torch.lerp(n, h, z, out=out)
        return h, c

    @staticmethod
    def coefficients(
        p: Tensor, saved: Tensor, h: Tensor, c: Rest, y: Tensor, after: Rest, params: Operands
    ) -> Operands:
        (n, r, z, q), (of_n, of_r, of_z, of_q) = saved.chunk(4, 1), p.chunk(4, 1)
        _tanh_backward(1 - z, n, grad_input=of_n)
        torch.mul(of_n, r, out=of_q)
        _sigmoid_backward(of_n * q, r, grad_input=of_r)
        _sigmoid_backward(h - n, z, grad_input=of_z)
        return ()

    @staticmethod
    def backward(
        sizes: Sizes, p: Tensor, saved: Tensor, others: Operands, grads: Grads, u: Operands, scratch: Tensor
    ) -> None:
        (operand,), (dh, _, _, below), H = u, grads, scratch.shape[2]
        each = (p[:, H:], p.unflatten(1, (4, H)), saved[:, 2 * H : 3 * H])
        steps = list(zip(*(by_step(t, sizes) for t in each), dh, below, strict=True))
        for gates, every, z, d, under in reversed(steps):
            every.mul_(d[:, None])
            under.addcmul_(d, z).addmm_(gates, operand)

    @staticmethod
    def products(p: Tensor, others: Operands, h: Tensor, c: Rest) -> list[tuple[Tensor, Tensor]]:
        return [(p[:, h.shape[1] :], h)]


class GRUBefore(Tuned):
    """x: r z n. The sigmoids are adjacent, and so are the gates that the gradient of h reaches first."""

    states, saved, width, gradient_width, param_grads = 1, 3, 3, 3, 3
    columns = grads = rows = (0, 1, 2)

    @staticmethod
    def forward_weights(u: Tensor) -> Operands:
        return tuple(part.t().contiguous() for part in GRUBefore.backward_weights(u))

    @staticmethod
    def backward_weights(u: Tensor) -> Operands:
        return u.split((2 * u.shape[1], u.shape[1]))

    @staticmethod
    def activate(x: Tensor, h: Tensor, c: Rest, u: Operands) -> None:
        H = h.shape[1]
        x[:, : 2 * H].addmm_(h, u[0]).sigmoid_()
        x[:, 2 * H :].addmm_(x[:, :H] * h, u[1]).tanh_()

    @staticmethod
    def forward(
        sizes: Sizes, x: Tensor, h: Tensor, c: Rest, y: Tensor, cs: Rest, u: Operands, scratch: Tensor
    ) -> After:
        (first, last), rows = u, -1
        each = (x[:, : 2 * y.shape[1]], *x.chunk(3, 1), y)
        for m, sigmoids, r, z, n, out in zip(sizes, *(by_step(t, sizes) for t in each), strict=True):
            if m != rows:
                h, of_h, rows = h[:m], scratch[0, :m], m
            sigmoids.addmm_(h, first).sigmoid_()
            n.addmm_(torch.mul(r, h, out=of_h), last).tanh_()
            h = torch.lerp(n, h, z, out=out)
        return h, c

    @staticmethod
    def coefficients(
        p: Tensor, saved: Tensor, h: Tensor, c: Rest, y: Tensor, after: Rest, params: Operands
    ) -> Operands:
        (r, z, n), (of_r, of_z, of_n) = saved.chunk(3, 1), p.chunk(3, 1)
        _tanh_backward(1 - z, n, grad_input=of_n)
        _sigmoid_backward(h - n, z, grad_input=of_z)
        _sigmoid_backward(h, r, grad_input=of_r)
        return (r * h,)

    @staticmethod
    def backward(
        sizes: Sizes, p: Tensor, saved: Tensor, others: Operands, grads: Grads, u: Operands, scratch: Tensor
    ) -> None:
        (first, last), (dh, _, _, below), H = u, grads, scratch.shape[2]
        r, z = saved[:, : 2 * H].chunk(2, 1)
        each = (p[:, : 2 * H], p[:, H:].unflatten(1, (2, H)), p[:, :H], p[:, 2 * H :], r, z)
        steps = list(zip(sizes, *(by_step(t, sizes) for t in each), dh, below, strict=True))
        rows = -1
        for m, gates, of_h, of_r, of_n, r, z, d, under in reversed(steps):
            if m != rows:
                of_second, rows = scratch[0, :m], m
            of_h.mul_(d[:, None])
            torch.mm(of_n, last, out=of_second)
            of_r.mul_(of_second)
            under.addcmul_(d, z).addcmul_(of_second, r).addmm_(gates, first)

    @staticmethod
    def products(p: Tensor, others: Operands, h: Tensor, c: Rest) -> list[tuple[Tensor, Tensor]]:
        H = h.shape[1]
        return [(p[:, : 2 * H], h), (p[:, 2 * H :], others[0])]


class Tanh(Tuned):
    """x is empty: backward needs only y."""

    states, saved, width, gradient_width, param_grads = 1, 0, 0, 1, 1
    columns = grads = rows = (0,)
    activation = torch.tanh_

    @classmethod
    def forward(
        cls, sizes: Sizes, x: Tensor, h: Tensor, c: Rest, y: Tensor, cs: Rest, u: Operands, scratch: Tensor
    ) -> After:
        (operand,), activation, rows = u, cls.activation, -1
        for m, out in zip(sizes, by_step(y, sizes), strict=True):
            if m != rows:
                h, rows = h[:m], m
            h = activation(out.addmm_(h, operand))
        return h, c

    @staticmethod
    def coefficients(
        p: Tensor, saved: Tensor | None, h: Tensor, c: Rest, y: Tensor, after: Rest, params: Operands
    ) -> Operands:
        torch.addcmul(torch.ones((), dtype=y.dtype, device=y.device), y, y, value=-1, out=p)
        return ()

    @staticmethod
    def backward(
        sizes: Sizes, p: Tensor, saved: Tensor | None, others: Operands, grads: Grads, u: Operands, scratch: Tensor
    ) -> None:
        (operand,), (dh, _, _, below) = u, grads
        for gate, d, under in reversed(list(zip(by_step(p, sizes), dh, below, strict=True))):
            under.addmm_(gate.mul_(d), operand)


class Relu(Tanh):
    """Its derivative is not a factor: torch's backward of relu is 0 where y is 0, even for a gradient of inf or NaN,
    and the gradient itself where y is NaN."""

    activation = torch.relu_

    @staticmethod
    def coefficients(
        p: Tensor, saved: Tensor | None, h: Tensor, c: Rest, y: Tensor, after: Rest, params: Operands
    ) -> Operands:
        return (y,)

    @staticmethod
    def backward(
        sizes: Sizes, p: Tensor, saved: Tensor | None, others: Operands, grads: Grads, u: Operands, scratch: Tensor
    ) -> None:
        (operand,), (dh, _, _, below) = u, grads
        steps = list(zip(by_step(p, sizes), by_step(others[0], sizes), dh, below, strict=True))
        for gate, y, d, under in reversed(steps):
            under.addmm_(_relu_backward(d, y, 0, grad_input=gate), operand)


CELLS: dict[str, type[Tuned]] = {"lstm": LSTM, "gru": GRU, "gru_before": GRUBefore, "rnn_tanh": Tanh, "rnn_relu": Relu}
