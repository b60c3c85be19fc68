"""convert and revert: training goes on as if nothing had happened, and a module keeps all it has."""

import copy
import logging
import pickle
import warnings

import pytest
import torch
from conftest import DEVICE
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqcells
from seqcells import convert, revert

KINDS = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]


@pytest.fixture(autouse=True)
def on_the_device():
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


class Tagger(nn.Module):
    """A class for each word of sentences of different lengths, packed."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 6, padding_idx=0)
        self.rnn = nn.LSTM(6, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(10, 4)

    def losses(self):
        while True:
            lengths = torch.randint(1, 8, (5,), device="cpu")
            inside = torch.arange(int(lengths.max())) < lengths[:, None].to(DEVICE)
            words = torch.where(inside, torch.randint(1, 30, inside.shape), 0)
            packed = pack_padded_sequence(self.embed(words), lengths, batch_first=True, enforce_sorted=False)
            y, (h, _) = self.rnn(packed)
            y, back = pad_packed_sequence(y, batch_first=True)
            assert torch.equal(back, lengths)
            loss = nn.functional.cross_entropy(self.tags(y)[inside], (words % 4)[inside])
            yield loss + h[-2:].square().mean()


class LanguageModel(nn.Module):
    """Windows over one long text: tied embeddings, a normalised recurrent weight, states that are carried detached."""

    def __init__(self, num_layers=2):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.rnn = parametrizations.weight_norm(nn.LSTM(6, 6, num_layers), "weight_hh_l0")
        self.decode = nn.Linear(6, 20)
        self.decode.weight = self.embed.weight

    def losses(self):
        state = None
        while True:
            text = torch.randint(0, 20, (5, 3))
            y, state = self.rnn(self.embed(text[:-1]), state)
            state = tuple(s.detach() for s in state)
            yield nn.functional.cross_entropy(self.decode(y).flatten(0, 1), text[1:].flatten())


class SmallLanguageModel(LanguageModel):
    def __init__(self):
        super().__init__(num_layers=1)


class Translator(nn.Module):
    """An encoder, and a decoder of single steps that reads what it wrote."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(4, 5)
        self.decoder = nn.LSTMCell(4, 5)
        self.write = nn.Linear(5, 4)

    def losses(self):
        while True:
            source = torch.randn(4, 3, 4)
            _, (h, c) = self.encoder(source)
            state, word, loss = (h[0], c[0]), torch.zeros(3, 4), 0.0
            for target in source.flip(0):
                state = self.decoder(word, state)
                word = self.write(state[0])
                loss = loss + nn.functional.mse_loss(word, target)
            yield loss


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("model", [Tagger, LanguageModel, SmallLanguageModel, Translator])
def test_training_goes_on_as_if_nothing_had_happened(model, backend, double):
    """Ten steps converted, then five reverted, with an optimizer that was made before."""
    found = []
    for swapped in (False, True):
        torch.manual_seed(0)
        module = model()
        keys, parameters = list(module.state_dict()), list(module.parameters())
        optimizer = torch.optim.Adam(module.parameters(), 0.01)
        torch.manual_seed(1)
        losses, run = [], module.losses()
        for step in range(15):
            if swapped and step == 0:
                assert convert(module, backend=backend) is module
                assert not {type(m) for m in module.modules()} & {nn.LSTM, nn.LSTMCell}
            if swapped and step == 10:
                revert(module)
                assert not any(isinstance(m, seqcells.LSTM | seqcells.LSTMCell) for m in module.modules())
            loss = next(run)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert keys == list(module.state_dict())
        assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
        found.append(torch.stack(losses))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=0)
    assert found[0][-1] != found[0][0]


def zoo():
    """Every kind, at every kind of place."""
    cell = nn.GRUCell(3, 3)
    return nn.ModuleDict(
        {
            "list": nn.ModuleList([nn.LSTM(3, 4), nn.Sequential(nn.GRU(3, 4, bias=False), nn.Linear(1, 1))]),
            "dict": nn.ModuleDict({"rnn": nn.RNN(3, 4, nonlinearity="relu", batch_first=True), "one": cell}),
            "other": cell,
            "lstm": nn.LSTMCell(3, 4, bias=False),
            "elman": nn.RNNCell(3, 4, nonlinearity="relu"),
        }
    )


SETTINGS = ["input_size", "hidden_size", "bias", "num_layers", "batch_first", "dropout", "bidirectional", "proj_size"]
SETTINGS += ["nonlinearity"]


def structure(module):
    return {k: type(v) for k, v in module.__dict__.items()}, list(module._parameters)


def settings(module):
    return [getattr(module, name, None) for name in SETTINGS]


def test_every_kind_at_every_place_and_back():
    model, report = zoo(), []
    before = {n: (type(m), structure(m), settings(m)) for n, m in model.named_modules()}
    parameters, random = dict(model.named_parameters()), torch.get_rng_state()
    assert convert(model, report=report) is model
    assert torch.equal(torch.get_rng_state(), random)
    recurrent = [m for m in model.modules() if type(m).__name__ in KINDS]
    assert len(recurrent) == 6 and all(type(m) is getattr(seqcells, type(m).__name__) for m in recurrent)
    assert model["other"] is model["dict"]["one"]
    for name, module in model.named_modules():
        assert settings(module) == before[name][2]
        if module in recurrent:
            fresh = getattr(seqcells, type(module).__name__)(3, 4)
            assert set(structure(module)[0]) == set(structure(fresh)[0]) and "_flat_weights" not in vars(module)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert str(report[2]) == "dict.rnn: torch.nn.RNN -> seqcells.RNN"
    assert report[3] == seqcells.Change(("dict.one", "other"), "torch.nn.GRUCell", "seqcells.GRUCell")
    x = torch.randn(2, 3)
    for module in recurrent:
        module(x)
    assert convert(model, report=report) is model and len(report) == 6, "once is enough"
    random = torch.get_rng_state()
    revert(model, report=report)
    assert len(report) == 12 and torch.equal(torch.get_rng_state(), random)
    for name, module in model.named_modules():
        assert (type(module), structure(module), settings(module)) == before[name]
    for module in recurrent:
        module(x)
        copy.deepcopy(module)(x)
        pickle.loads(pickle.dumps(module))(x)


@pytest.mark.parametrize("name", KINDS)
def test_the_model_itself(name):
    module = getattr(nn, name)(3, 4)
    x = torch.randn(5, 3)
    expected = module(x)
    assert convert(module) is module and type(module) is getattr(seqcells, name)
    torch.testing.assert_close(module(x), expected)
    assert revert(module) is module and type(module) is getattr(nn, name)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "dropout": 0.5},
        {"bidirectional": True, "bias": False},
        {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True},
    ],
    ids=["dropout", "no bias", "projection"],
)
def test_every_setting(options):
    theirs = nn.LSTM(3, 4, **options).eval()
    ours = convert(copy.deepcopy(theirs))
    assert repr(ours) == f"seqcells.{theirs!r}" and not ours.training
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(x), theirs(x))
    revert(ours)
    assert ours._flat_weights_names == theirs._flat_weights_names and ours._all_weights == theirs._all_weights
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert all(r() is w for r, w in zip(ours._flat_weight_refs, ours._flat_weights, strict=True))
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_no_warning_twice_and_settings_changed_since():
    with pytest.warns(UserWarning, match="dropout"):
        lstm = nn.LSTM(3, 4, dropout=0.2)
    lstm.dropout = 0.3
    lstm.batch_first = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(lstm)
        assert lstm.dropout == 0.3 and lstm(torch.ones(2, 5, 3))[1][0].shape == (1, 2, 4)
        revert(lstm)
    assert lstm.dropout == 0.3 and lstm.batch_first


def test_a_module_keeps_what_it_has():
    lstm = nn.LSTM(3, 4)
    lstm.weight_ih_l0.requires_grad_(False)
    lstm.register_buffer("mean", torch.ones(3), persistent=False)
    lstm.note = ["mine"]
    lstm.readout = nn.Linear(4, 1)
    lstm.eval()
    seen = []
    handles = [
        lstm.register_forward_pre_hook(lambda m, a: seen.append(("pre", m))),
        lstm.register_forward_hook(lambda m, a, k, y: seen.append(("post", m)), with_kwargs=True),
        lstm.register_full_backward_hook(lambda m, i, o: seen.append(("backward", m))),
        lstm.register_state_dict_pre_hook(lambda m, p, k: seen.append(("save", m))),
        lstm.register_load_state_dict_pre_hook(lambda m, *a: seen.append(("load", m))),
        lstm.weight_hh_l0.register_hook(lambda g: seen.append(("gradient", lstm))),
    ]
    x = torch.ones(2, 1, 3, requires_grad=True)
    for swap, kind in ((convert, seqcells.LSTM), (revert, nn.LSTM)):
        swap(lstm)
        assert type(lstm) is kind and not lstm.training and not lstm.weight_ih_l0.requires_grad
        assert lstm.note == ["mine"] and "mean" in dict(lstm.named_buffers()) and "mean" not in lstm.state_dict()
        assert lstm.readout(torch.ones(4)).shape == (1,)
        seen.clear()
        lstm(x)[0].sum().backward()
        lstm.load_state_dict(lstm.state_dict())
        assert sorted(what for what, _ in seen) == ["backward", "gradient", "load", "post", "pre", "save"]
        assert all(m is lstm for _, m in seen)
    convert(lstm)
    for handle in handles:
        handle.remove()
    seen.clear()
    lstm(x)[0].sum().backward()
    assert not seen


def test_copies_of_a_converted_model():
    model = convert(zoo(), backend="reference", save="states", precision="ieee")
    x = torch.randn(2, 3)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert repr(copied) == repr(model) and list(copied.state_dict()) == list(zoo().state_dict())
        assert copied["other"] is copied["dict"]["one"]
        torch.testing.assert_close(copied["lstm"](x), model["lstm"](x))
        zoo().load_state_dict(copied.state_dict())
        layer = copied["list"][0]
        assert (layer.backend, layer.save, layer.precision) == ("reference", "states", "ieee")
        assert not set(map(id, copied.parameters())) & set(map(id, model.parameters()))


def test_a_compiled_model_follows():
    """Compiled code is not stale after a swap, and the wrapper of torch.compile can be given as the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(5, 2, 3)
    expected = compiled(x)[0]
    seen = []
    seqcells.LSTM.forward, forward = lambda *a, **k: seen.append(1) or forward(*a, **k), seqcells.LSTM.forward
    try:
        torch.testing.assert_close(compiled(x)[0], expected)
        convert(compiled)
        assert not seen
        torch.testing.assert_close(compiled(x)[0], expected)
        assert seen
        seen.clear()
        revert(model)
        torch.testing.assert_close(compiled(x)[0], expected)
        assert not seen
    finally:
        seqcells.LSTM.forward = forward


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_parametrized_modules(name):
    torch.manual_seed(0)
    module, weights = getattr(nn, name)(3, 4), ["weight_ih", "weight_hh", "bias_ih"]
    weights = [w + ("_l0" if name == "LSTM" else "") for w in weights]
    parametrizations.weight_norm(module, weights[0])
    for w in weights[1:]:
        parametrize.register_parametrization(module, w, Doubled())
    x = torch.randn(2, 3)
    keys, expected, plain = list(module.state_dict()), module(x), getattr(module, weights[0]).detach()
    originals = list(module.parameters())
    for swap, kind in ((convert, getattr(seqcells, name)), (revert, getattr(nn, name)), (convert, None)):
        swap(module)
        assert kind is None or parametrize.type_before_parametrizations(module) is kind
        assert type(module).__name__ == f"Parametrized{name}"
        assert all(parametrize.is_parametrized(module, w) for w in weights)
        assert keys == list(module.state_dict())
        assert all(a is b for a, b in zip(originals, module.parameters(), strict=True))
        torch.testing.assert_close(module(x), expected)
        with parametrize.cached():
            assert getattr(module, weights[0]) is getattr(module, weights[0])
            torch.testing.assert_close(module(x), expected)
        if swap is convert:
            torch.testing.assert_close(copy.deepcopy(module)(x), expected)
        setattr(module, weights[1], getattr(module, weights[1]).detach())
        torch.testing.assert_close(module(x), expected)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(module)
    for w in weights:
        parametrize.remove_parametrizations(module, w)
    assert type(module) is getattr(seqcells, name)
    assert isinstance(getattr(module, weights[0]), nn.Parameter)
    torch.testing.assert_close(getattr(module, weights[0]).detach(), plain)
    torch.testing.assert_close(module(x), expected)


def test_power_iterations_are_not_made_by_a_swap():
    lstm = parametrizations.spectral_norm(nn.LSTM(3, 4), "weight_hh_l0")
    before = copy.deepcopy(lstm.state_dict())
    revert(convert(lstm))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), lstm.state_dict().values(), strict=True))
    assert lstm(torch.ones(2, 3))[0].isfinite().all()


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "prune"])
def test_weights_that_a_hook_computes(how):
    def make():
        torch.manual_seed(0)
        lstm = nn.LSTM(3, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            if how == "prune":
                prune.l1_unstructured(lstm, "weight_hh_l0", amount=0.5)
            else:
                getattr(nn.utils, how)(lstm, "weight_hh_l0")
        return lstm, torch.optim.SGD(lstm.parameters(), 0.1)

    (theirs, first), (ours, second) = make(), make()
    x = torch.randn(4, 2, 3)
    for step in range(6):
        if step in (0, 4):
            convert(ours)
        if step == 2:
            revert(ours)
        for module, optimizer in ((theirs, first), (ours, second)):
            optimizer.zero_grad()
            module(x)[0].square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    if how == "prune":
        assert (ours.weight_hh_l0 == 0).sum() == 32
        prune.remove(ours, "weight_hh_l0")
    else:
        getattr(nn.utils, f"remove_{how}")(ours, "weight_hh_l0")
    assert isinstance(ours.weight_hh_l0, nn.Parameter) and len(list(ours.parameters())) == 4
    assert type(ours) is seqcells.LSTM and ours(x)[0].isfinite().all()


def converted(model):
    return {n for n, m in model.named_modules(remove_duplicate=False) if type(m).__module__.startswith("seqcells")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "lstm"}, {"lstm"}),
        ({"include": ["list.*", "elman"]}, {"list.0", "list.1.0", "elman"}),
        ({"include": "list.?"}, {"list.0"}),
        ({"exclude": "list.*"}, {"dict.rnn", "dict.one", "other", "lstm", "elman"}),
        ({"exclude": ["dict.*"]}, {"list.0", "list.1.0", "lstm", "elman"}),
        ({"include": iter(["dict.*"]), "exclude": "other"}, {"dict.rnn"}),
        ({"include": []}, set()),
    ],
)
def test_include_and_exclude(options, expected):
    assert converted(convert(zoo(), **options)) == expected


def test_revert_some():
    model = convert(zoo())
    left = converted(revert(model, include=["list.*", "other"], exclude="list.0"))
    assert left == {"list.0", "dict.rnn", "lstm", "elman"}


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("swap", [convert, revert])
def test_a_pattern_that_matches_nothing(swap, argument):
    model = zoo()
    with pytest.raises(ValueError, match=rf"{argument}: 'list\.9' matches no recurrent module; there are: 'list\.0'"):
        swap(model, **{argument: ["list.*", "list.9"]})
    assert not converted(model)
    with pytest.raises(ValueError, match="there are: none"):
        swap(nn.Linear(1, 1), include="*")


class Peephole(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


def test_what_is_left_alone(caplog):
    patched = nn.GRU(3, 4)
    patched.forward = lambda x: x
    model = nn.ModuleDict({"own": Peephole(3, 4), "patched": patched, "plain": nn.GRU(3, 4)})
    report = []
    with caplog.at_level(logging.DEBUG, "seqcells"):
        convert(model, report=report)
    assert type(model["own"]) is Peephole and type(patched) is nn.GRU and type(model["plain"]) is seqcells.GRU
    subclass = "a subclass of torch.nn.LSTM; to change it: "
    subclass += f"mapping={{{__name__}.Peephole: Yours}}, Yours a subclass of seqcells.LSTM"
    assert [c.skipped for c in report] == [
        subclass,
        "its forward was replaced on the instance",
        "",
    ]
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", f"own: {__name__}.Peephole left alone: {subclass}"),
        ("WARNING", "patched: torch.nn.GRU left alone: its forward was replaced on the instance"),
        ("DEBUG", "plain: torch.nn.GRU -> seqcells.GRU"),
        ("INFO", "seqcells.convert: 1 torch.nn.GRU -> seqcells.GRU; 2 left alone"),
    ]
    caplog.clear()
    convert(model, exclude=["own", "patched"])
    assert not caplog.records


def test_revert_refuses_what_torch_has_not_and_changes_nothing():
    model = convert(zoo())
    model["before"] = seqcells.GRU(3, 4, reset_after=False)
    model["cell"] = seqcells.GRUCell(3, 4, reset_after=False)
    names = converted(model)
    with pytest.raises(ValueError, match=r"before: torch.nn has no GRU with reset_after=False.*\ncell: "):
        revert(model)
    assert converted(model) == names
    assert converted(revert(model, exclude=["before", "cell"])) == {"before", "cell"}
    assert type(revert(seqcells.RNNCell(3, 4, nonlinearity="relu"))) is nn.RNNCell


@pytest.mark.parametrize("wrong", [{"backend": "cuda"}, {"save": "all"}, {"precision": "high"}])
def test_wrong_options_change_nothing(wrong):
    for model in (zoo(), nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="unknown"):
            convert(model, **wrong)
        assert not converted(model)
