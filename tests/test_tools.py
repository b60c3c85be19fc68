"""Tools of torch that recognize torch.nn's modules by name or type, with ours: fx, quantization, repr; and the messages
of convert."""

import copy
import logging
import pickle
import sys
import warnings

import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_sequence

import seqcells
from seqcells import convert, revert

LOGGER = sys.modules["seqcells.convert"].LOGGER
same = torch.testing.assert_close


# torch.fx


class Translator(nn.Module):
    """All ways to call a layer or cell: alone, with a state, with keywords; a first word that is no fx.Proxy."""

    def __init__(self, masks=False):
        super().__init__()
        self.masks = masks
        self.embed, self.write = nn.Linear(3, 4), nn.Linear(4, 3)
        self.lower, self.encoder, self.plain = nn.GRU(4, 4), nn.LSTM(4, 4), nn.RNN(4, 4)
        self.decoder, self.gate, self.elman = nn.LSTMCell(3, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)

    def forward(self, x, resets, lengths):
        more = {"resets": resets, "lengths": lengths} if self.masks else {}
        y, h = self.lower(torch.relu(self.embed(x)), **more)
        y, _ = self.plain(y, h)
        if self.masks:
            y, state, cells = self.encoder(y, return_cell_states=True, **more)
            y = y + cells
        else:
            y, state = self.encoder(y)
        y, (h, c) = self.encoder(y, state)
        word = torch.zeros(2, 3)
        state = h[0], c[0]
        for _ in range(2):
            state = self.decoder(word, state)
            word = self.write(self.elman(self.gate(state[0]), state[1]))
        return y, word, self.decoder(word)[0]


def masks(T):
    return torch.rand(T, 2) < 0.3, torch.tensor([T, T - 1])


@pytest.mark.parametrize("subclass", [False, True])
def test_fx_sees_one_node_for_each_call_as_with_torchs(subclass):
    torch.manual_seed(0)
    theirs = Translator()
    ours = convert(copy.deepcopy(theirs), subclass=subclass)
    expected, traced = fx.symbolic_trace(theirs), fx.symbolic_trace(ours)
    assert str(traced.graph) == str(expected.graph)
    for T in (5, 7):
        x = torch.randn(T, 2, 3)
        same(traced(x, *masks(T)), theirs(x, *masks(T)))
        assert traced.encoder is ours.encoder
    traced(x, *masks(7))[0].sum().backward()
    same(ours.lower.weight_hh_l0.grad, torch.autograd.grad(theirs(x, *masks(7))[0].sum(), theirs.lower.weight_hh_l0)[0])
    for copied in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        same(copied(x, *masks(7)), traced(x, *masks(7)))


def test_fx_keeps_resets_lengths_and_cell_states():
    torch.manual_seed(0)
    model = convert(Translator(masks=True))
    traced = fx.symbolic_trace(model)
    lower, encoder = (next(n for n in traced.graph.nodes if n.target == name) for name in ("lower", "encoder"))
    assert sorted(lower.kwargs) == ["lengths", "resets"] and len(lower.args) == 1
    assert sorted(encoder.kwargs) == ["lengths", "resets", "return_cell_states"]
    for T in (5, 8):
        given = torch.randn(T, 2, 3), *masks(T)
        same(traced(*given), model(*given))


def test_fx_and_hooks():
    """A hook that computes a weight may run while fx traces; one that changes what passes would do so twice."""
    model, x = nn.Sequential(convert(nn.GRU(3, 4))), torch.randn(5, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0], "weight_hh_l0")
    same(fx.symbolic_trace(model)(x), model(x))
    handle = model[0].register_forward_pre_hook(lambda module, given: (2 * given[0],))
    with pytest.raises(RuntimeError, match=r"torch.fx would call this GRU's forward hooks while it traces and again"):
        fx.symbolic_trace(model)
    handle.remove()
    assert fx.symbolic_trace(model)


def test_fx_on_a_layer_alone_fails_as_on_torchs():
    for module in (nn.LSTM(3, 4), seqcells.LSTM(3, 4), seqcells.subclasses.LSTM(3, 4), seqcells.GRUCell(3, 4)):
        with pytest.raises(fx.proxy.TraceError, match=r"symbolically traced|cannot look into this (LSTM|GRUCell)"):
            fx.symbolic_trace(module)


# torch.ao.quantization


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(3, 3), nn.RNN(3, 4), nn.Linear(4, 1)
        self.lstm, self.gru = nn.LSTM(4, 4), nn.GRU(4, 4)
        self.cell = nn.GRUCell(4, 4)
        self.again = nn.ModuleList([self.lstm])

    def forward(self, x):
        y = self.gru(self.lstm(self.rnn(self.embed(x))[0])[0])[0]
        return self.head(self.cell(y[-1]))


def quantized(model):
    """And what was said of our modules."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = quantize_dynamic(model, dtype=torch.qint8)
    return result, [str(w.message) for w in caught if "seqcells" in str(w.message)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("subclass", [False, True])
def test_quantize_dynamic_says_what_it_leaves_and_what_to_do(subclass):
    torch.manual_seed(0)
    model, x = Model(), torch.randn(5, 2, 3)
    expected, said = quantized(model)
    assert not said
    convert(model, subclass=subclass)
    names = [repr(m) for m in (model.lstm, model.gru, model.cell)]  # of nn.RNN torch has no quantized one itself
    for _ in range(2):
        left, said = quantized(model)
        assert [s.partition(" as it is")[0] for s in said] == [f"torch.ao.quantization leaves {n}" for n in names]
        assert all("call seqcells.revert(model) first" in s for s in said)
        assert type(left.lstm) is type(model.lstm) and not hasattr(left.lstm, "qconfig")
    found, said = quantized(revert(model))
    assert not said and type(found.lstm) is torch.ao.nn.quantized.dynamic.LSTM
    same(found(x), expected(x), rtol=0, atol=0)


def test_qconfig_is_an_attribute_like_any_other():
    module = seqcells.LSTM(3, 4)
    assert not hasattr(module, "qconfig")
    with pytest.raises(AttributeError, match="qconfig"):
        del module.qconfig
    with pytest.warns(UserWarning, match=r"leaves seqcells.LSTM\(3, 4\) as it is"):
        module.qconfig = torch.ao.quantization.default_dynamic_qconfig
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.qconfig.weight is not None
    assert revert(module).qconfig is not None


# repr


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_repr_says_whose_it_is(name):
    theirs, ours = getattr(nn, name)(8, 16), getattr(seqcells, name)(8, 16)
    assert repr(ours) == f"seqcells.{name}(8, 16)" == f"seqcells.{theirs!r}"

    class Mine(getattr(seqcells, name)):
        pass

    assert repr(Mine(8, 16)) == "Mine(8, 16)"
    weight = "weight_hh" if name.endswith("Cell") else "weight_hh_l0"
    assert repr(parametrizations.weight_norm(ours, weight)).startswith(f"seqcells.Parametrized{name}(\n  8, 16\n")


# What convert says.


def model():
    return nn.ModuleList([nn.LSTM(3, 4), nn.LSTM(4, 4), nn.GRUCell(3, 4)])


def test_one_line_by_default(capsys, monkeypatch):
    monkeypatch.setattr(LOGGER, "propagate", False)  # as where nobody called logging.basicConfig: pytest did
    converted = convert(model())
    summary = "seqcells.convert: 2 torch.nn.LSTM -> seqcells.LSTM, 1 torch.nn.GRUCell -> seqcells.GRUCell\n"
    assert capsys.readouterr() == ("", summary)
    convert(converted)
    already = "seqcells.convert: nothing to do: already seqcells': 3 recurrent modules in this ModuleList\n"
    assert capsys.readouterr().err == already
    convert(nn.Sequential(nn.Linear(3, 4)))
    said = capsys.readouterr().err
    assert said == "seqcells.convert: nothing to do: no LSTM, GRU, RNN or cell of these in this Sequential\n"
    convert(converted, exclude="*")
    said = capsys.readouterr().err
    assert "include and exclude leave none of 3 recurrent modules in this ModuleList" in said
    converted[0].forward = print
    revert(converted)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "0: seqcells.LSTM left alone: its forward was replaced on the instance"
    assert said[1].endswith("1 seqcells.LSTM -> torch.nn.LSTM, 1 seqcells.GRUCell -> torch.nn.GRUCell; 1 left alone")
    monkeypatch.setattr(LOGGER, "level", logging.WARNING)
    convert(model())
    assert capsys.readouterr() == ("", "")


def test_where_logging_is_configured_it_decides(caplog, capsys):
    convert(model())
    assert capsys.readouterr() == ("", "") and not caplog.records  # pytest's level is WARNING
    with caplog.at_level(logging.DEBUG, "seqcells"):
        convert(model())
    levels = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert levels[0] == ("DEBUG", "0: torch.nn.LSTM -> seqcells.LSTM") and len(levels) == 4
    assert levels[3][0] == "INFO" and levels[3][1].startswith("seqcells.convert: 2 torch.nn.LSTM")
    caplog.clear()
    convert(nn.Linear(1, 1))
    assert [r.levelname for r in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("swap", [convert, revert])
def test_a_class_is_no_model(swap):
    name = swap.__name__
    words = rf"must be a torch.nn.Module, got the class GRU: {name} takes an instance, as in {name}\(GRU\(...\)\)$"
    with pytest.raises(TypeError, match=words):
        swap(nn.GRU)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got None$"):
        swap(None)


# Parametrizations


class Counted(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * 1


@pytest.mark.parametrize("steps", [5, 200])  # torch's own, and the loop
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_parametrization_is_evaluated_once_a_call(name, steps):
    module, counted = getattr(seqcells, name)(3, 16, num_layers=2), Counted()
    parametrize.register_parametrization(module, "weight_hh_l0", counted)
    x, resets = torch.randn(steps, 2, 3), torch.rand(steps, 2) < 0.1
    packed = pack_sequence([torch.randn(steps, 3), torch.randn(steps - 1, 3)])
    for options in (
        {"input": x},
        {"input": packed},
        {"input": x, "resets": resets},
        {"input": x, "lengths": [steps, 2]},
    ):
        counted.calls = 0
        module(**options)
        assert counted.calls == 1


def test_spectral_norm_in_training_and_not():
    """torch.nn.LSTM evaluates it several times a call, each a step of its power iteration: not the same path."""
    torch.manual_seed(0)
    theirs = parametrizations.spectral_norm(nn.LSTM(8, 16), "weight_hh_l0", n_power_iterations=1)
    ours, x = convert(copy.deepcopy(theirs)), torch.randn(5, 2, 8)
    norm, before = "parametrizations.weight_hh_l0.0._u", ours.parametrizations.weight_hh_l0[0]._u.clone()
    with torch.no_grad():
        expected = copy.deepcopy(theirs)
        expected.weight_hh_l0  # one evaluation  # noqa: B018
        ours(x)
    same(ours.state_dict()[norm], expected.state_dict()[norm])
    assert not torch.equal(before, ours.state_dict()[norm])
    ours.load_state_dict(theirs.state_dict())
    same(ours.eval()(x), theirs.eval()(x))
