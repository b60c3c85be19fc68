"""The tasks' data and losses against their definitions, written with plain loops."""

import math

import pytest
import torch
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st

import seqcells
from seqcells.tasks import count_ones_regression, echo, memorize, temporal_order

seeds = st.integers(0, 2**31)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 6))
def test_every_string_is_there_once_with_its_count(length):
    inputs, counts = count_ones_regression.every_string(length)
    rows = ["".join(str(int(v)) for v in row) for row in inputs[..., 0].tolist()]
    assert rows == [format(n, f"0{length}b") for n in range(2**length)]
    assert counts.tolist() == [row.count("1") for row in rows]


@given(st.integers(1, 40), seeds)
def test_strings_to_be_judged_by(length, seed):
    x = count_ones_regression.test_strings(length, generator(seed))
    assert x.shape == (66, length, 1) and set(x.unique().tolist()) <= {0.0, 1.0}
    assert x[-2].min() == 1 and x[-1].max() == 0


def test_answers_at_the_ends_of_a_padded_batch_are_those_of_each_length():
    case = count_ones_regression.CASES["goal"]
    run = count_ones_regression.start("goal", "lstm", case.quick, 0)
    with torch.no_grad():
        worst = max((run.model(x)[:, -1] - x.sum((1, 2))).abs().max().item() for x in run.test)
        assert math.isclose(run.measure()["worst"], worst, rel_tol=1e-5)
    assert [x.shape[1] for x in run.test] == list(range(65, 128))


def test_the_split_takes_each_string_once():
    run = count_ones_regression.start("literal", "lstm", count_ones_regression.CASES["literal"].quick, 3)
    both = torch.cat([run.training[0], run.test[0]])[..., 0]
    assert len(run.training[0]) == 3276 and len(both.unique(dim=0)) == 4096 == len(both)


@given(st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=2))
def test_letters_there_and_back(string):
    assert memorize.decoded(memorize.encoded(string)) == string


@pytest.mark.parametrize("string", ["", "A", "AbC", "A B"])
def test_what_is_no_string_of_letters_is_refused(string):
    with pytest.raises(ValueError, match="string must be two letters"):
        memorize.encoded(string)


def test_carried_and_replayed_gradients_are_what_they_say():
    """At the third character: detached stops at the state, replay is the gradient of the prefix."""
    recipe = memorize.Recipe("ABC", hidden=4, epochs=1)
    run = memorize.start("2", "gru", recipe, 0, dtype=torch.float64)
    with pytest.raises(ValueError, match="unknown form 'exact'"):
        memorize.start("2", "gru", memorize.Recipe("ABC", form="exact"), 0)
    gradients = {}
    for form in memorize.FORMS[:2]:
        run = memorize.start("2", "gru", memorize.Recipe("ABC", hidden=4, form=form), 0, dtype=torch.float64)
        for group in run.optimizer.param_groups:
            group["lr"] = 0.0  # then both stand at the same parameters
        run.step()
        gradients[form] = run.model.layer.weight_hh_l0.grad.clone()
    x, model = run.x, run.model
    whole = torch.nn.functional.cross_entropy(model(x[:, :2])[0][-1:], run.letters[2:])
    (expected,) = torch.autograd.grad(whole, model.layer.weight_hh_l0)
    torch.testing.assert_close(gradients["replay"], expected)
    _, state = model(x[:, :1])
    last = torch.nn.functional.cross_entropy(model(x[:, 1:2], state.detach())[0], run.letters[2:])
    (expected,) = torch.autograd.grad(last, model.layer.weight_hh_l0)
    torch.testing.assert_close(gradients["detached"], expected)


@given(st.integers(1, 30), seeds)
def test_strings_with_three_symbols_far_apart(count, seed):
    symbols, classes = temporal_order.strings(count, generator(seed))
    for row, given_class in zip(symbols.tolist(), classes.tolist(), strict=True):
        text = "".join(temporal_order.SYMBOLS[s] for s in row)
        assert len(text) == 110 and text[-1] == "B"
        begin = len(text) - len(text.lstrip("E")) - 1  # the last E begins the string
        assert 100 <= 110 - begin <= 110 and "E" not in text[begin + 1 :]
        places = [i - begin for i, s in enumerate(text) if s in "XY"]
        assert len(places) == 3
        for place, (low, high) in zip(places, ((9, 20), (32, 43), (65, 76)), strict=True):
            assert low <= place < high
        assert temporal_order.orders()[given_class] == "".join(s for s in text if s in "XY")


def test_lengths_places_and_classes_are_all_drawn():
    symbols, classes = temporal_order.strings(5_000, generator(0))
    assert len(classes.unique()) == 8 and torch.bincount(classes).min() > 500
    assert len((symbols == 0).sum(1).unique()) == 11


def test_the_plateau_is_the_best_constant():
    labels = torch.nn.functional.one_hot(torch.arange(8), 8)
    outputs = torch.full((8, 110, 8), -40.0)
    outputs[:, 0], outputs[:, 1] = math.log(7 / 8), math.log(1 / 8)
    loss = temporal_order.time_for_class(outputs, labels).item()
    assert math.isclose(loss, temporal_order.PLATEAU, rel_tol=1e-5) and round(temporal_order.PLATEAU, 4) == 0.3768


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_streak_counts_good_answers_since_the_last_bad_one(cell):
    recipe = temporal_order.Recipe(64, 0.0, batch=4, hidden=4, window=8, test=2)
    run = temporal_order.start("order", cell, recipe, 0)
    streak = 0
    for goods in ([1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]):
        for good in goods:
            streak = streak + 1 if good else 0

        class Told(torch.nn.Module):
            def forward(self, x, goods=goods):
                # The class asked for is not known here: read from the string itself.
                ys = torch.stack([row[(row == 5) | (row == 6)] for row in x.argmax(-1)]) - 5
                classes = (ys * torch.tensor([4, 2, 1], device=x.device)).sum(1)
                told = torch.nn.functional.one_hot(classes, 8) * 50.0
                sign = torch.tensor(goods, device=x.device)[:, None] * 2 - 1
                return (told * sign).requires_grad_()

        run.model = Told()
        run.step()
        assert run.streak.item() == streak
        assert run.stop() == (streak >= 8)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), seeds)
def test_windows_of_sequences(rows, count, length, seed):
    sequences = echo.integers(rows, count + length - 1, 100, generator(seed))
    assert sequences.max() <= 98 and sequences.min() >= 0
    found = echo.windows(sequences, length).tolist()
    assert found == [[row[k : k + length] for row in sequences.tolist()] for k in range(count)]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_stateful_goes_on_from_its_rows_values_and_lets_no_gradient_across(cell):
    kind = seqcells.LSTM if cell == "lstm" else seqcells.GRU
    layer = kind(3, 4, batch_first=True, dtype=torch.float64, device=DEVICE)
    stateful = echo.Stateful(layer)
    x = torch.randn(2, 3, 5, 3, dtype=torch.float64, device=DEVICE)  # two batches of three rows
    first, second = stateful(x[0]), stateful(x[1])
    whole, _ = layer(torch.cat([x[0], x[1]], 1))
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    second.sum().backward()
    got = layer.weight_ih_l0.grad.clone()
    layer.zero_grad()
    _, states = layer(x[0])
    states = tuple(s.detach() for s in states) if cell == "lstm" else states.detach()
    layer(x[1], states)[0].sum().backward()
    torch.testing.assert_close(got, layer.weight_ih_l0.grad)
    with pytest.raises(ValueError, match="expected a batch of 3 rows as before, got 2"):
        stateful(x[0, :2])
    stateful.reset_states()
    torch.testing.assert_close(stateful(x[0]), first)


def test_evaluation_leaves_the_states_of_training_alone():
    recipe = echo.Recipe(steps=4, exact=0.0, outputs=0, inputs=3, hidden=4, symbols=5, batch=2, stateful=True, test=7)
    run = echo.start("stateful", "lstm", recipe, 0)
    run.step()
    before = run.layer.states
    with torch.no_grad():
        assert run.measure() == run.measure()
    assert run.layer.states is before


def test_encoder_and_decoder():
    model = echo.EncoderDecoder("lstm", 7, 6, 2)
    assert model(torch.randn(3, 5, 7)).shape == (3, 2, 7)
    last = model.encoder(x := torch.randn(3, 5, 7))[1][0][0]
    expected = model.head(model.decoder(torch.stack([last, last], 1))[0])
    torch.testing.assert_close(model(x), expected)
