"""Parity of the kernels with the reference in float64, as a table: every cell, schedule, dtype and gradient.

TOLERANCE is the project's one table: the tests use it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, explanation, functional, reference
from .cell import keys, named

# Largest relative error ||a - b|| / ||b|| against float64 on the same (rounded) inputs. Half precision: a few roundings
# of 2^-8 (bfloat16) or 2^-11 (float16) a value, gathered over the steps. "tf32": products rounded to 2^-11. "tf32x3":
# an operand's two parts leave 2^-22 of it.
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
INPUTS = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")
OUTPUTS = ("y", "h_n", "c_n")


def tolerance(cell: str, dtype: torch.dtype | str, shape: Shape) -> float:
    """The table's; for relu in low precision, if more, twice that of the reference's steps rounded to that precision.

    Where rounding moves a pre-activation across zero, relu's derivative jumps, and that element's gradient is lost
    whole, in any implementation, the more the longer the sequence.
    """
    _check_shape(cell, shape)
    if not isinstance(dtype, (str, torch.dtype)) or dtype not in TOLERANCE:
        raise ValueError(f"unknown dtype {dtype!r}: expected one of {', '.join(map(str, TOLERANCE))}")
    if cell != "rnn_relu" or dtype in (torch.float64, torch.float32, "tf32x3"):
        return TOLERANCE[dtype]
    # float16 rounds as TF32 does.
    low = torch.float16 if dtype == "tf32" else dtype
    assert isinstance(low, torch.dtype)
    return max(TOLERANCE[dtype], 2 * max(errors(cell, shape, low, "cpu", backend=None).values()))


@dataclass(frozen=True)
class Shape:
    T: int
    B: int
    I: int  # noqa: E741  (the letter the whole project uses)
    H: int


# Odd on purpose: no size is a multiple of a tile, B needs several programs, H one tile and several.
SMALL = (Shape(4, 3, 2, 20), Shape(3, 17, 3, 33))
# On a device: the largest resident sizes, several batch tiles, and a U that must be spread over all of it or streamed.
LARGE = (
    Shape(50, 17, 5, 20),
    Shape(60, 33, 7, 64),
    Shape(40, 130, 20, 128),
    Shape(20, 70, 9, 300),
    Shape(9, 3, 9, 1000),
)


def _check_shape(cell: str, shape: Shape) -> None:
    named(cell)
    if not isinstance(shape, Shape):
        raise checks.wrong("shape", "a Shape", shape)


def inputs(
    cell: str, shape: Shape, dtype: torch.dtype, device: str | torch.device, scale: float = 1.0, seed: int = 0
) -> list[Tensor]:
    """x, w_ih, w_hh, b_ih, b_hh, h0[, c0] of a cell, random; at scale 1 the gates work from one end to the other."""
    _check_shape(cell, shape)
    checks.dtype(dtype)
    checks.device(device)
    checks.number("scale", scale)
    checks.integer("seed", seed)
    spec, generator = named(cell), torch.Generator().manual_seed(seed)
    T, B, I, H, G = shape.T, shape.B, shape.I, shape.H, spec.rows[1]  # noqa: E741
    sizes = [(T, B, I), (G * H, I), (G * H, H), (G * H,), (G * H,), *[(B, H)] * len(spec.states)]
    scales = [1.0, I**-0.5, H**-0.5, 0.5, 0.5, 0.5, 0.5]
    made = [
        scale * s * torch.randn(n, generator=generator, dtype=torch.float64)
        for n, s in zip(sizes, scales, strict=False)
    ]
    return [t.to(device, dtype) for t in made]


def run(
    cell: str,
    tensors: list[Tensor],
    resets: Tensor | None,
    *,
    backend: str | None,
    save: str = "gates",
    precision: str | None = None,
    seed: int = 1,
) -> dict[str, Tensor]:
    """Every output and every gradient of a weighted sum of the outputs, by name (gradients with a leading d).

    backend: None is the reference with every operation rounded to the tensors' dtype.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]
    x, w_ih, w_hh, b_ih, b_hh, *states = leaves
    if backend is None:
        step = reference.step_of(cell)
        y, final = reference.scan(step, x, tuple(states), w_ih, w_hh, b_ih, b_hh, resets=resets)
    else:
        how: dict[str, Any] = {"resets": resets, "save": save, "backend": backend, "precision": precision}
        y, final = functional.scan(cell, x, tuple(states), w_ih, w_hh, b_ih, b_hh, **how)
    outputs = (y, *final)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights)
    named = dict(zip(OUTPUTS, (o.detach() for o in outputs), strict=False))
    return named | {f"d{n}": g for n, g in zip(INPUTS, gradients, strict=False)}


def errors(
    cell: str,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    *,
    backend: str | None,
    save: str = "gates",
    precision: str | None = None,
    resets: bool = False,
    scale: float = 1.0,
) -> dict[str, float]:
    """The relative error of each output and gradient of a backend against the reference in float64."""
    tensors = inputs(cell, shape, dtype, device, scale)
    checks.boolean("resets", resets)
    mask = None
    if resets:
        mask = (torch.rand(shape.T, shape.B, generator=torch.Generator().manual_seed(2)) < 0.3).to(device)
    got = run(cell, tensors, mask, backend=backend, save=save, precision=precision)
    # The reference runs on the CPU: the device's own matmuls are not to judge themselves.
    exact = run(cell, [t.cpu().double() for t in tensors], None if mask is None else mask.cpu(), backend="reference")
    return {name: relative(got[name], exact[name]) for name in exact}


def relative(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||; infinite if anything is not finite."""
    for name, t in (("got", got), ("exact", exact)):
        checks.tensor(name, t)
        if t.is_meta:
            raise RuntimeError(f"{name} is on the meta device: it has no values")
    if got.shape != exact.shape:
        raise RuntimeError(f"got must have the shape of exact, {tuple(exact.shape)}, not {tuple(got.shape)}")
    difference = (got.cpu().double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)
    return float(difference.nan_to_num(nan=torch.inf))


@dataclass(frozen=True)
class Result:
    cell: str
    schedule: str
    dtype: str
    errors: dict[str, float]
    tolerance: float

    @property
    def good(self) -> bool:
        return max(self.errors.values()) <= self.tolerance


def kinds(device: str, dtypes: list[str] | None = None) -> list[torch.dtype | str]:
    """What `sweep` runs a cell and schedule in, of those named, None: of all. Keys of TOLERANCE.

    ValueError if none is left: tf32 and tf32x3 are a CUDA device's.
    """
    checks.device(device)
    if dtypes is not None and (not isinstance(dtypes, (tuple, list)) or not all(isinstance(n, str) for n in dtypes)):
        raise checks.wrong("dtypes", "a list of names or None", dtypes)
    products = ["tf32", "tf32x3"] if torch.device(device).type == "cuda" else []
    every: list[torch.dtype | str] = [torch.float64, torch.float32, *products, torch.float16, torch.bfloat16]
    chosen = [kind for kind in every if dtypes is None or str(kind).removeprefix("torch.") in dtypes]
    if not chosen:
        raise ValueError(f"dtypes must be some that {device} has, got {', '.join(dtypes or ())}")
    return chosen


def sweep(device: str, cells: list[str] | None = None, dtypes: list[str] | None = None) -> Iterator[Result]:
    """The largest errors over the device's shapes, with and without resets, by cell, schedule and dtype.

    On a device float32 is checked at every precision; the interpreter has only one.
    """
    shapes = LARGE if torch.device(device).type == "cuda" else SMALL
    for cell in cells or keys():
        for schedule in backends.SCHEDULES:
            for kind in kinds(device, dtypes):
                yield _worst(cell, schedule, kind, device, shapes)


def _worst(cell: str, schedule: str, kind: torch.dtype | str, device: str, shapes: tuple[Shape, ...]) -> Result:
    dtype, precision = (kind, "ieee") if isinstance(kind, torch.dtype) else (torch.float32, kind)
    worst: dict[str, float] = {}
    allowed = 0.0
    for shape in shapes:
        size: dict[str, Any] = {"batch": shape.B, "hidden_size": shape.H, "dtype": dtype}
        try:
            explanation.explain(cell, device=device, backend=f"triton:{schedule}", precision=precision, **size)
        except ValueError:  # U does not fit on chip: there the schedule does not exist
            continue
        allowed = max(allowed, tolerance(cell, kind, shape))
        for save, resets in (("gates", False), ("states", True)):
            how: dict[str, Any] = {"save": save, "precision": precision, "resets": resets}
            found = errors(cell, shape, dtype, device, backend=f"triton:{schedule}", **how)
            worst = {n: max(e, worst.get(n, 0.0)) for n, e in found.items()}
    return Result(cell, schedule, str(kind).removeprefix("torch."), worst, allowed)


def table(results: list[Result]) -> str:
    """One line a cell, schedule and dtype; one column an output or gradient."""
    columns = [*OUTPUTS, *(f"d{n}" for n in INPUTS)]
    lines = [("cell", "schedule", "dtype", *columns, "allowed", "")]
    for r in results:
        shown = [f"{r.errors[c]:.0e}" if c in r.errors else "-" for c in columns]
        lines.append((r.cell, r.schedule, r.dtype, *shown, f"{r.tolerance:.0e}", "ok" if r.good else "WRONG"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)
