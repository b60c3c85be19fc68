"""Tests of a cell: every output and gradient of every backend against the cell's step in float64.

`check` tests a custom cell. TOLERANCE is the project's only table of tolerances; its own tests use it too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, drawn, explanation, functional, reference
from .cell import Cell, named
from .kernels.registry import BUILT_IN

# Largest relative error ||a - b|| / ||b|| against float64 on the same (rounded) inputs. Half precision: a few roundings
# of 2^-8 (bfloat16) or 2^-11 (float16) a value, accumulated over the steps. "tf32": operands rounded to 2^-11.
# "tf32x3": rounded to 2^-22, as an operand is the sum of two parts.
TOLERANCE: dict[torch.dtype | str, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    "tf32": 3e-3,
    "tf32x3": 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
# Largest absolute difference of any element from torch.nn's, in networks of a few units and steps.
AGAINST_TORCH = {torch.float64: 1e-10, torch.float32: 5e-5}
# Operations whose result or derivative is discontinuous, and those that are unbounded or undefined somewhere.
_JUMPS = {"lt", "le", "gt", "ge", "eq", "ne", "where"}
_UNBOUNDED = {"div", "exp", "exp2", "expm1", "log", "log1p", "log2", "pow", "sqrt"}


def tolerance(cell: str | Cell, dtype: torch.dtype | str, shape: Shape) -> float:
    """The tolerance in the table. For a cell that compares, divides or has exponentials, it is at least twice the error
    of its own steps rounded to that precision.

    If rounding moves a pre-activation across zero, relu's derivative jumps, and the whole gradient of that element is
    wrong. This happens in any implementation, and more often in longer sequences.

        >>> seqcells.testing.tolerance("lstm", torch.float32, seqcells.testing.Shape(T=5, B=3, I=10, H=20))
        1e-05
    """
    _check_shape(cell, shape)
    if not isinstance(dtype, (str, torch.dtype)) or dtype not in TOLERANCE:
        raise ValueError(f"unknown dtype {dtype!r}: expected one of {', '.join(map(str, TOLERANCE))}")
    if dtype in (torch.float64, "tf32x3") or smooth(cell):
        return TOLERANCE[dtype]
    # float16 rounds as TF32 does.
    low = torch.float16 if dtype == "tf32" else dtype
    assert isinstance(low, torch.dtype)
    rounded = max(errors(cell, shape, low, "cpu", backend=None).values())
    return max(TOLERANCE[dtype], 2 * rounded) if math.isfinite(rounded) else TOLERANCE[dtype]


def smooth(cell: str | Cell) -> bool:
    """Whether a cell has neither jumps nor operations that are unbounded, so that each element is as precise as all.

    >>> seqcells.testing.smooth("lstm"), seqcells.testing.smooth("rnn_relu")
    (True, False)
    """
    return not (_JUMPS | _UNBOUNDED) & named(cell).operations


@dataclass(frozen=True)
class Shape:
    """The sizes of a check: steps, batch size, input size and hidden size."""

    T: int
    B: int
    I: int  # noqa: E741  (the letter the whole project uses)
    H: int


# Odd on purpose: no size is a multiple of a tile, B needs several programs, and H one tile or several.
SMALL = (Shape(4, 3, 2, 20), Shape(3, 17, 3, 33))
# On a GPU: the largest resident sizes, several batch tiles, and a U that must be spread over all of it or streamed.
LARGE = (
    Shape(50, 17, 5, 20),
    Shape(60, 33, 7, 64),
    Shape(40, 130, 20, 128),
    Shape(20, 70, 9, 300),
    Shape(9, 3, 9, 1000),
)


def _check_shape(cell: str | Cell, shape: Shape) -> None:
    named(cell)
    if not isinstance(shape, Shape):
        raise checks.wrong("shape", "a Shape", shape)


def names(cell: str | Cell) -> list[str]:
    """The names of the tensors of `inputs`: x; w_ih, w_hh, b_ih and b_hh, if the cell has them; the initial states,
    such as h0; then trained vectors and per-step inputs by their own names."""
    known = named(cell)
    weights = {"w_ih": known.x_gates, "w_hh": known.u_gates}
    weights |= {"b_ih": _biased(known, known.x_gates), "b_hh": _biased(known, known.u_gates)}
    starts = [f"{state}0" for state in known.states]
    return ["x", *(name for name, gates in weights.items() if gates), *starts, *known.params, *known.inputs]


def _biased(cell: Cell, gates: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(gate for gate in gates if gate in cell.biased)


def outputs(cell: str | Cell) -> list[str]:
    """The names of the outputs: y, and the final states, such as h_n."""
    return ["y", *(f"{state}_n" for state in named(cell).states)]


def inputs(
    cell: str | Cell,
    shape: Shape,
    dtype: torch.dtype,
    device: str | torch.device,
    scale: float = 1.0,
    seed: int = 0,
) -> list[Tensor]:
    """Random tensors for a cell, in the order of `names`. At scale 1 gates cover their whole range.

    If a cell divides or has exponentials, its initial states are states that it reaches from zero, because it may not
    be defined for others.
    """
    _check_shape(cell, shape)
    checks.dtype(dtype)
    checks.device(device)
    checks.number("scale", scale)
    checks.integer("seed", seed)
    known, generator = named(cell), torch.Generator().manual_seed(seed)
    T, B, I, H = shape.T, shape.B, shape.I, shape.H  # noqa: E741
    sizes: dict[str, tuple[float, tuple[int, ...]]] = {
        "x": (1.0, (T, B, I)),
        "w_ih": (I**-0.5, (len(known.x_gates) * H, I)),
        "w_hh": (H**-0.5, (len(known.u_gates) * H, H)),
        "b_ih": (0.5, (len(_biased(known, known.x_gates)) * H,)),
        "b_hh": (0.5, (len(_biased(known, known.u_gates)) * H,)),
    }
    sizes |= {f"{state}0": (0.5, (B, H)) for state in known.states}
    sizes |= {name: (0.5, (1 if name in known.scalars else H,)) for name in known.params}
    sizes |= {name: (0.5, (T, B, H) if n % 2 else (T, B)) for n, name in enumerate(known.inputs)}
    made = {}
    for name in names(cell):
        by, size = sizes[name]
        made[name] = scale * by * torch.randn(size, generator=generator, dtype=torch.float64)
    starts = [f"{state}0" for state in known.states]
    if not _UNBOUNDED & known.operations:
        return [t.to(device, dtype) for t in made.values()]
    before = made | {"x": 2 * made["x"].flip(0)} | {name: torch.zeros_like(made[name]) for name in starts}
    with torch.no_grad():
        reached = scan(known, list(before.values()), backend=None)[1:]
    made |= dict(zip(starts, reached, strict=True))
    return [t.to(device, dtype) for t in made.values()]


def scan(cell: str | Cell, tensors: Sequence[Tensor], *, backend: str | None, **options: Any) -> tuple[Tensor, ...]:
    """y and the final states, computed by a backend from tensors in the order of `names`.

    backend: None is the reference with every operation rounded to the tensors' dtype. options: those of
    functional.scan.
    """
    known, given = named(cell), dict(zip(names(cell), tensors, strict=True))
    states = tuple(given[f"{state}0"] for state in known.states)
    weights = w_ih, w_hh, b_ih, b_hh = [given.get(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    params, steps = ({n: given[n] for n in wanted} for wanted in (known.params, known.inputs))
    dropout = drawn.example(known, given["x"].dtype).to(given["x"].device) if known.drawn else None
    if backend is None:
        wide = (t if t.dim() == 3 else t[..., None].expand(*t.shape, states[0].shape[-1]) for t in steps.values())
        rounded: dict[str, object] = {n: options.get(n) for n in ("resets", "lengths")}
        beside = tuple(wide)
        if dropout is not None:
            (T, B, _), H = given["x"].shape, states[0].shape[-1]
            masks = drawn.given(known, None, dropout, (T, B, 1, H), given["x"].dtype)
            known, beside = drawn.explicit(known), (*beside, *masks.split(H, -1))
        rounded |= {"params": tuple(params.values()), "inputs": beside}
        y, final = reference.scan(reference.step_of(known), given["x"], states, *weights, **rounded)
    else:
        options |= {"params": params, "inputs": steps, "backend": backend, "dropout": dropout}
        y, final = functional.scan(known, given["x"], states, w_ih, w_hh, b_ih, b_hh, **options)
    return y, *final


def run(
    cell: str | Cell,
    tensors: Sequence[Tensor],
    resets: Tensor | None = None,
    *,
    backend: str | None,
    lengths: Tensor | None = None,
    save: str = "gates",
    precision: str | None = None,
    seed: int = 1,
) -> dict[str, Tensor]:
    """All outputs, and all gradients of a weighted sum of the outputs, by name (gradients with a leading d).

    backend: None is the reference with every operation rounded to the tensors' dtype.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]
    found = scan(cell, leaves, backend=backend, resets=resets, lengths=lengths, save=save, precision=precision)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in found]
    # The gradient of a tensor that no output depends on is zero; a backend may return None for it.
    gradients = torch.autograd.grad(found, leaves, weights, allow_unused=True, materialize_grads=True)
    named = dict(zip(outputs(cell), (o.detach() for o in found), strict=True))
    return named | {f"d{n}": g for n, g in zip(names(cell), gradients, strict=True)}


def errors(
    cell: str | Cell,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    *,
    backend: str | None,
    save: str = "gates",
    precision: str | None = None,
    resets: bool = False,
    lengths: bool = False,
    scale: float = 1.0,
) -> dict[str, float]:
    """The relative error of each output and gradient of a backend against the reference in float64.

    >>> shape = seqcells.testing.Shape(T=5, B=3, I=10, H=20)
    >>> found = seqcells.testing.errors("gru", shape, torch.float32, "cpu", backend="loop")
    >>> max(found.values()) < 1e-5
    True
    """
    tensors = inputs(cell, shape, dtype, device, scale)
    checks.boolean("resets", resets)
    checks.boolean("lengths", lengths)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(shape.T, shape.B, generator=generator) < 0.3 if resets else None
    ends = torch.randint(1, shape.T + 1, (shape.B,), generator=generator) if lengths else None
    there = [None if t is None else t.to(device) for t in (mask, ends)]
    got = run(cell, tensors, there[0], lengths=there[1], backend=backend, save=save, precision=precision)
    # The reference runs on the CPU, so that the GPU's matrix products are not tested against themselves.
    exact = run(cell, [t.cpu().double() for t in tensors], mask, lengths=ends, backend="reference")
    return {name: relative(got[name], exact[name]) for name in exact}


def relative(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||; infinite if anything is not finite.

    >>> seqcells.testing.relative(torch.tensor([1.5, 0.0]), torch.tensor([1.0, 0.0]))
    0.5
    """
    for name, t in (("got", got), ("exact", exact)):
        checks.tensor(name, t)
        if t.is_meta:
            raise RuntimeError(f"{name} is on the meta device: it has no values")
    if got.shape != exact.shape:
        raise RuntimeError(f"got must have the shape of exact, {tuple(exact.shape)}, not {tuple(got.shape)}")
    difference = (got.to(exact.device).double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)
    return float(difference.nan_to_num(nan=torch.inf))


@dataclass(frozen=True)
class Result:
    """The largest error of each output and gradient of a cell, for one backend and dtype.

    missing: why there are no errors, if no shape fits the backend.
    """

    cell: str
    backend: str
    dtype: str
    errors: dict[str, float]
    tolerance: float
    missing: str = ""

    @property
    def good(self) -> bool:
        return all(e <= self.tolerance for e in self.errors.values())


def kinds(device: str, dtypes: Sequence[str | torch.dtype] | None = None) -> list[torch.dtype | str]:
    """The dtypes and precisions that `sweep` tests, as keys of TOLERANCE. dtypes: which, or their names; None: all.

    ValueError if none is left: tf32 and tf32x3 exist on CUDA only.
    """
    checks.device(device)
    listed = dtypes is None or isinstance(dtypes, (tuple, list))
    if not listed or not all(isinstance(d, (str, torch.dtype)) for d in dtypes or ()):
        raise checks.wrong("dtypes", "a list of dtypes or their names, as 'float32', or None", dtypes)
    names = [str(d).removeprefix("torch.") for d in dtypes or ()]
    every = [kind for kind in TOLERANCE if torch.device(device).type == "cuda" or not isinstance(kind, str)]
    chosen = [kind for kind in every if dtypes is None or str(kind).removeprefix("torch.") in names]
    if not chosen:
        raise ValueError(f"dtypes must be some that {device} has, got {', '.join(names)}")
    return chosen


BACKENDS = (*(f"triton:{schedule}" for schedule in backends.SCHEDULES), "loop")


def sweep(
    device: str,
    cells: Sequence[str | Cell] | None = None,
    dtypes: Sequence[str | torch.dtype] | None = None,
    backends: Sequence[str] = BACKENDS,
    shapes: Sequence[Shape] | None = None,
) -> Iterator[Result]:
    """The largest errors over shapes, with and without masks, by cell, backend and dtype. shapes: None means LARGE on
    a GPU, SMALL elsewhere.

    On a GPU, float32 is checked at every precision; the interpreter has only one.
    """
    if shapes is None:
        shapes = LARGE if torch.device(device).type == "cuda" else SMALL
    for cell in cells or BUILT_IN:
        for backend in backends:
            for kind in kinds(device, dtypes):
                yield _worst(cell, backend, kind, device, shapes)


def _worst(cell: str | Cell, backend: str, kind: torch.dtype | str, device: str, shapes: Sequence[Shape]) -> Result:
    dtype, precision = (kind, "ieee") if isinstance(kind, torch.dtype) else (torch.float32, kind)
    worst: dict[str, float] = {}
    allowed, missing = 0.0, ""
    for shape in shapes:
        if without := _missing(cell, backend, shape, dtype, device, precision):
            missing = without
            continue
        allowed = max(allowed, tolerance(cell, kind, shape))
        for save, masked in (("gates", {}), ("states", {"resets": True}), ("gates", {"resets": True, "lengths": True})):
            found = errors(cell, shape, dtype, device, backend=backend, save=save, precision=precision, **masked)
            worst = {n: max(e, worst.get(n, 0.0)) for n, e in found.items()}
    return Result(named(cell).name, backend, str(kind).removeprefix("torch."), worst, allowed, "" if worst else missing)


def _missing(
    cell: str | Cell, backend: str, shape: Shape, dtype: torch.dtype, device: str, precision: str = "ieee"
) -> str:
    """Why a schedule cannot run there, because U does not fit on chip, or the step takes means; "" if it can."""
    size: dict[str, Any] = {"batch": shape.B, "hidden_size": shape.H, "dtype": dtype, "device": device}
    try:
        explanation.explain(cell, backend=backend, precision=precision, **size)
    except ValueError as error:
        if "schedule does not fit" not in str(error):
            raise
        return str(error)
    return ""


def table(results: Sequence[Result]) -> str:
    """A table with a row for each cell, backend and dtype, and a column for each output and gradient."""
    columns = list(dict.fromkeys(name for r in results for name in r.errors))
    lines = [("cell", "backend", "dtype", *columns, "allowed", "")]
    for r in results:
        shown = [f"{r.errors[c]:.0e}" if c in r.errors else "-" for c in columns]
        verdict = r.missing or ("ok" if r.good else "WRONG")
        lines.append((r.cell, r.backend, r.dtype, *shown, f"{r.tolerance:.0e}", verdict))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


@contextmanager
def poisoned() -> Iterator[None]:
    """A context in which uninitialized memory is NaN, to find what a kernel fails to write or reads too early.

    >>> with seqcells.testing.poisoned():
    ...     torch.empty(2)
    tensor([nan, nan])
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # it has no type annotations
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


def check(
    cell: str | Cell,
    *,
    device: str | None = None,
    backends: Sequence[str] = BACKENDS,
    dtypes: Sequence[str | torch.dtype] | None = None,
) -> list[Result]:
    """Check every backend of a cell against its step, differentiated by autograd in float64.

    Checks every output and gradient, at sizes that do not fill a tile and with uninitialized memory set to NaN: for
    each schedule of the kernels and the loop, each dtype, both save modes, with resets and lengths. Then runs
    torch.autograd.gradcheck and gradgradcheck on each backend in float64. For the tolerances see `tolerance`. Takes
    minutes if kernels are interpreted.

    cell: a Cell, or its name. device: None means "cuda" if available, else "cpu". On the CPU, kernels need Triton's
    interpreter: set TRITON_INTERPRET=1 before Python starts. backends: which to check, such as "triton:grid". dtypes:
    which, or their names, such as "float32"; None means all.

    Returns the results, which `table` shows. Raises AssertionError with that table if an error is too large,
    RuntimeError if the kernels cannot run, CellError if no kernels can be derived from the step.

        >>> @seqcells.cell(gates="n", states="h")
        ... def leaky(x, U, h):
        ...     return 0.5 * h + 0.5 * torch.tanh(x.n + U.n(h))
        >>> results = seqcells.testing.check(leaky, backends=["loop"], dtypes=["float32"])
        >>> print(results[0].good)
        True
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = kinds(device, dtypes)
    with poisoned():
        results = list(sweep(device, [cell], dtypes, backends))
        if torch.float64 in chosen:
            derivatives(cell, device, backends)
    wrong = [r for r in results if not r.good]
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(results)} are not within tolerance:\n\n{table(results)}")
    return results


def derivatives(cell: str | Cell, device: str, backends: Sequence[str] = BACKENDS) -> None:
    """Run torch.autograd.gradcheck and gradgradcheck in float64 on each backend that can run the cell. AssertionError
    if one fails."""
    shape = Shape(2, 2, 1, 2)
    tensors = [t.requires_grad_() for t in inputs(cell, shape, torch.float64, device)]
    for backend in backends:
        if _missing(cell, backend, shape, torch.float64, device):
            continue

        def function(*given: Tensor, backend: str = backend) -> tuple[Tensor, ...]:
            return scan(cell, given, backend=backend)

        try:
            torch.autograd.gradcheck(function, tensors, fast_mode=True)
            torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
        except RuntimeError as error:  # torch.autograd.gradcheck.GradcheckError is one
            raise AssertionError(f"{named(cell).name}, {backend}: {error}") from error
