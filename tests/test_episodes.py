"""resets=, lengths= and return_cell_states= against torch.nn's modules, which have none of them and so run in parts."""

import itertools

import pytest
import torch
from conftest import DEVICE
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch_cases import KINDS, H, I, assert_same, everything, pair, start

import seqcells

T, B = 7, 4
BACKENDS = ["auto", "loop", "reference"]
FORMS = ["steps first", "batch first", "unbatched", "lengths", "packed", "packed resets"]
# Out of order, one of all steps; then one of none, too, which torch cannot pack.
LENGTHS, EMPTY = [5, 7, 2, 6], [5, 7, 0, 6]


@pytest.fixture(autouse=True)
def on_the_device():
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def tupled(hx):
    return hx if isinstance(hx, tuple) else (hx,)


def episodes(batch, steps=T, share=0.35):
    """Where episodes begin [T, B]: some at step 0, which the given start must not reach, and some past the lengths."""
    generator = torch.Generator(DEVICE).manual_seed(3)
    resets = torch.rand(steps, batch, generator=generator) < share
    resets[0, 0], resets[0, 1:] = True, False
    resets[steps - 1, -1] = True
    return resets


def segments(module, x, hx, resets, lengths):
    """Each sequence cut where its episodes begin, every part alone by torch.nn, from zero but for what hx enters:

    a forward direction's enters the first part, unless an episode begins there; a backward direction's the last part.
    x [T, B, I] to output [T, B, .], zero where padding, and final states: a forward direction's of the last part, a
    backward direction's of the first.
    """
    pair_of_states, count = module.mode == "LSTM", 2 if module.bidirectional else 1
    zeros = tuple(torch.zeros_like(s) for s in tupled(start(module, (x.shape[1],), x.dtype)))
    given = zeros if hx is None else tupled(hx)
    backward = (torch.arange(zeros[0].shape[0]) % count == 1)[:, None, None]
    outputs, finals = [], []
    for b in range(x.shape[1]):
        cuts = [0, *(t for t in range(1, lengths[b]) if resets[t, b]), lengths[b]]
        mine = tuple(s[:, b : b + 1] for s in given)
        parts, ends = [], []
        for first, last in itertools.pairwise(cuts):
            if first == last:  # a row without steps ends where it began
                ends.append(mine)
                continue
            forward_enters = first == 0 and not resets[0, b]
            enters = torch.where(backward, last == lengths[b], forward_enters)
            states = tuple(s * enters for s in mine)
            y, end = module(x[first:last, b : b + 1], states if pair_of_states else states[0])
            parts.append(y)
            ends.append(tupled(end))
        width = (module.proj_size or H) * count
        outputs.append(torch.cat([*parts, x.new_zeros(x.shape[0] - lengths[b], 1, width)]))
        finals.append(tuple(torch.where(backward, f, e) for f, e in zip(ends[0], ends[-1], strict=True)))
    final = tuple(torch.cat(s, 1) for s in zip(*finals, strict=True))
    return torch.cat(outputs, 1), final if pair_of_states else final[0]


def called(ours, form, resets, lengths):
    """ours in one of FORMS, as a function of x [T, B, I] and hx with outputs as `segments` has them."""
    turned = resets.t() if form == "batch first" or (ours.batch_first and form != "unbatched") else resets

    def function(x, hx):
        if form == "unbatched":
            hx = None if hx is None else tuple(s[:, 0] for s in hx) if isinstance(hx, tuple) else hx[:, 0]
            y, final = ours(x[:, 0], hx, resets=resets[:, 0])
            final = tuple(s[:, None] for s in final) if isinstance(final, tuple) else final[:, None]
            return y[:, None], final
        if form == "batch first":
            y, final = ours(x.transpose(0, 1), hx, resets=turned)
            return y.transpose(0, 1), final
        if form == "lengths":
            return ours(x, hx, resets=turned, lengths=lengths)
        if form == "steps first":
            return ours(x, hx, resets=turned)
        sizes = torch.tensor(lengths, device="cpu")
        packed = pack_padded_sequence(x, sizes, enforce_sorted=False)
        given = pack_padded_sequence(resets, sizes, enforce_sorted=False) if form == "packed resets" else turned
        y, final = ours(packed, hx, resets=given)
        return pad_packed_sequence(y, total_length=x.shape[0])[0], final

    return function


def check_resets(kind, form, layers, bidirectional, backends):
    # The padded resets of packed input follow batch_first, as the input itself does not.
    batch_first = form == "batch first" or (form == "packed" and layers == 2)
    options = {"num_layers": layers, "bidirectional": bidirectional}
    theirs, ours = pair(kind, batch_first=batch_first, **options)
    theirs.batch_first = False
    batch = 1 if form == "unbatched" else B
    lengths = EMPTY if form == "lengths" else LENGTHS if form.startswith("packed") else [T] * batch
    resets, x = episodes(batch), torch.randn(T, batch, I, dtype=torch.float64)
    for hx in (start(theirs, (batch,)), None):
        expected = everything(theirs, lambda x, hx: segments(theirs, x, hx, resets, lengths), x, hx)
        for backend in backends:
            ours.backend = backend
            got = everything(ours, called(ours, form, resets, lengths), x, hx)
            assert_same(got, expected, f"{kind}, {form}, {options}, {'hx' if hx is not None else 'no hx'} on {backend}")


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_resets_are_separate_runs_of_torch_nn(kind, form, layers):
    for bidirectional in (False, True):
        check_resets(kind, form, layers, bidirectional, BACKENDS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [pytest.param("LSTM-proj", marks=pytest.mark.slow), "GRU"])
def test_resets_in_the_kernels_are_separate_runs_of_torch_nn(kind, form):
    check_resets(kind, form, 2 if form == "batch first" else 1, form != "unbatched", ["triton"])


def rollout(name, cell, lengths, done):
    """The loop that people write: a cell at every step, its state times (1 - done), frozen where a row has ended."""

    def function(x, hx):
        states, outputs = tupled(hx), []
        states = tuple(s[0] for s in states)
        for t, step in enumerate(x):
            before = tuple(s * (1 - done[t, :, None]) for s in states)
            after = tupled(cell(step, before if name == "LSTM" else before[0]))
            alive = (t < lengths)[:, None]
            states = tuple(torch.where(alive, a, s) for a, s in zip(after, states, strict=True))
            outputs.append(after[0] * alive)
        final = tuple(s[None] for s in states)
        return torch.stack(outputs), final if name == "LSTM" else final[0]

    return function


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_a_rollout_of_environments_is_the_loop_over_a_cell(name, packed):
    steps, environments = 200, 16
    theirs, ours = pair(name)
    cell = getattr(torch.nn, f"{name}Cell")(I, H, dtype=torch.float64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in ours.state_dict().items()})
    done = episodes(environments, steps, share=0.04)
    generator = torch.Generator(DEVICE).manual_seed(4)
    lengths = torch.randint(1, steps + 1, (environments,), generator=generator) if packed else None
    every = torch.full((environments,), steps)
    x, hx = torch.randn(steps, environments, I, dtype=torch.float64), start(theirs, (environments,))
    if lengths is not None:
        lengths[3] = steps
    expected = everything(cell, rollout(name, cell, every if lengths is None else lengths, done.double()), x, hx)
    expected = {k if "gradient of " not in k or "_" not in k else f"{k}_l0": v for k, v in expected.items()}
    for backend in BACKENDS:
        ours.backend = backend
        form = "steps first" if lengths is None else "packed"
        got = everything(ours, called(ours, form, done, [] if lengths is None else lengths.tolist()), x, hx)
        assert_same(got, expected, f"{name}, {form} on {backend}")


def check_lengths(kind, options, backends):
    theirs, ours = pair(kind, **options)
    batch_first = options["batch_first"]
    lengths = torch.tensor(LENGTHS)
    padding = torch.arange(T)[:, None] >= lengths
    padding = (padding.t() if batch_first else padding)[..., None]
    x = torch.randn(*((B, T) if batch_first else (T, B)), I, dtype=torch.float64)

    def packing(x, hx):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first, enforce_sorted=False)
        y, final = theirs(packed, hx)
        return pad_packed_sequence(y, batch_first, total_length=T)[0], final

    for hx in (start(theirs, (B,)), None):
        expected = everything(theirs, packing, x.masked_fill(padding, 0), hx)
        for backend in backends:
            ours.backend = backend
            for given in (lengths, LENGTHS):
                call = lambda x, hx, given=given: ours(x, hx, lengths=given)  # noqa: E731
                got = everything(ours, call, x.masked_fill(padding, torch.nan), hx)
                assert all(t.isfinite().all() for t in got.values())
                assert_same(got, expected, f"{kind}, {options} on {backend}")


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", list(KINDS))
def test_lengths_are_packing(kind, layers, batch_first):
    for bidirectional in (False, True):
        options = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first}
        check_lengths(kind, options, [*BACKENDS, "aten"])


@pytest.mark.parametrize("kind", list(KINDS))
def test_lengths_in_the_kernels_are_packing(kind):
    check_lengths(kind, {"num_layers": 1, "bidirectional": True, "batch_first": False}, ["triton"])


def stepped(module, x, hx, lengths):
    """An LSTM by torch.nn.LSTMCell's function, step after step: output, final states, the last layer's cell states.

    x [T, B, I]. With a projection, h enters beside x, since a cell's own h has its c's size.
    """
    count = 2 if module.bidirectional else 1
    finals, rows = [], None if lengths is None else torch.tensor(lengths)
    for layer in range(module.num_layers):
        outputs, cells = [], []
        for direction in range(count):
            k = layer * count + direction
            w_ih, w_hh, b_ih, b_hh, *projection = module.all_weights[k]
            weights = (torch.cat([w_ih, w_hh], 1), w_hh.new_zeros(4 * H, H), b_ih, b_hh)
            h, c = (s[k] for s in hx)
            ys, cs = [None] * len(x), [None] * len(x)
            for t in reversed(range(len(x))) if direction else range(len(x)):
                new, new_c = torch.lstm_cell(torch.cat([x[t], h], 1), (torch.zeros_like(c), c), *weights)
                new = new @ projection[0].t() if projection else new
                alive = torch.ones(x.shape[1], 1, dtype=torch.bool) if rows is None else (t < rows)[:, None]
                ys[t], cs[t] = new * alive, new_c * alive
                h, c = torch.where(alive, new, h), torch.where(alive, new_c, c)
            outputs.append(torch.stack(ys))
            cells.append(torch.stack(cs))
            finals.append((h, c))
        x, every = torch.cat(outputs, 2), torch.cat(cells, 2)
    return x, tuple(torch.stack(s) for s in zip(*finals, strict=True)), every


CELL_STATES = [
    {},
    {"bidirectional": True, "batch_first": True},
    {"num_layers": 2},
    {"num_layers": 2, "bidirectional": True},
]


def check_cell_states(kind, options, lengths, backends):
    theirs, ours = pair(kind, **options)
    x, turn = torch.randn(T, B, I, dtype=torch.float64), options.get("batch_first", False)
    hx = start(theirs, (B,))

    def call(x, hx):
        y, final, every = ours(x.transpose(0, 1) if turn else x, hx, lengths=lengths, return_cell_states=True)
        return (y.transpose(0, 1), final, every.transpose(0, 1)) if turn else (y, final, every)

    expected = everything(theirs, lambda x, hx: stepped(theirs, x, hx, lengths), x, hx)
    for backend in backends:
        ours.backend = backend
        assert_same(everything(ours, call, x, hx), expected, f"{kind}, {options}, {lengths} on {backend}")


@pytest.mark.parametrize("lengths", [None, LENGTHS, EMPTY], ids=str)
@pytest.mark.parametrize("options", CELL_STATES, ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "LSTM-proj"])
def test_cell_states_are_those_of_stepping(kind, options, lengths):
    check_cell_states(kind, options, lengths, BACKENDS)


@pytest.mark.parametrize("lengths", [None, EMPTY], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "LSTM-proj"])
def test_cell_states_in_the_kernels_are_those_of_stepping(kind, lengths):
    check_cell_states(kind, {"bidirectional": True}, lengths, ["triton"])


def test_cell_states_of_other_input():
    """Packed and unbatched are what a batch has; without gradients, and with resets, they are what training has."""
    _, ours = pair("LSTM", bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    for backend in BACKENDS:
        ours.backend = backend
        _, _, every = ours(x, lengths=LENGTHS, return_cell_states=True)
        packed = pack_padded_sequence(x, torch.tensor(LENGTHS, device="cpu"), enforce_sorted=False)
        torch.testing.assert_close(pad_packed_sequence(ours(packed, return_cell_states=True)[2])[0], every)
        torch.testing.assert_close(ours(x[:, 1], return_cell_states=True)[2], every[:, 1])
        with torch.no_grad():
            torch.testing.assert_close(ours(x, lengths=LENGTHS, return_cell_states=True)[2], every)
        resets = torch.zeros(T, B, dtype=torch.bool)
        resets[3] = True
        _, _, cut = ours(x, resets=resets, return_cell_states=True)
        halves = [ours(part, return_cell_states=True)[2] for part in (x[:3], x[3:])]
        torch.testing.assert_close(cut, torch.cat(halves))
    with pytest.raises(RuntimeError, match="cell states"):
        seqcells.LSTM(I, H, backend="aten")(torch.randn(T, B, I), return_cell_states=True)
