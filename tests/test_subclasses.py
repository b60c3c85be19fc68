"""Layers that are torch.nn's to isinstance, and users' subclasses of torch.nn's classes, by mapping."""

import copy
import io
import logging
import pickle
import warnings
from abc import ABC, abstractmethod

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo import config
from torch._dynamo.exc import Unsupported
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqcells
from seqcells import convert, revert, subclasses

LAYERS = ["LSTM", "GRU", "RNN"]
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]


def pair(name, *sizes, **options):
    """torch.nn's layer and the same converted to a subclass of it."""
    torch.manual_seed(0)
    theirs = getattr(nn, name)(*sizes, **options)
    return theirs, convert(copy.deepcopy(theirs), subclass=True)


def same(got, expected):
    torch.testing.assert_close(got, expected)


def step(module, x):
    module.zero_grad()
    y, h = module(x)
    (y.square().sum() + sum(s.sum() for s in (h if isinstance(h, tuple) else (h,)))).backward()
    return [y, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_instances_of_both(name):
    for module in (getattr(subclasses, name)(3, 4), convert(getattr(nn, name)(3, 4), subclass=True)):
        assert type(module) is getattr(subclasses, name)
        assert isinstance(module, getattr(nn, name)) and isinstance(module, getattr(seqcells, name))
    assert isinstance(getattr(seqcells, name)(3, 4), getattr(nn, name)) == (name in CELLS)
    assert (getattr(subclasses, name) is getattr(seqcells, name)) == (name in CELLS)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_the_same_numbers_and_parameters(name, options):
    theirs, ours = pair(name, 3, 4, **options)
    torch.manual_seed(0)
    made = getattr(subclasses, name)(3, 4, **options)
    x = torch.randn(5, 2, 3)
    for module in (ours, made):
        assert list(module.state_dict()) == list(theirs.state_dict())
        assert repr(module) == f"seqcells.subclasses.{theirs!r}"
        same(step(module, x), step(theirs, x))
    resets = torch.rand(ours(x)[0].shape[:2]) < 0.5
    plain = convert(copy.deepcopy(theirs))
    same(ours(x, resets=resets), plain(x, resets=resets))


@pytest.mark.parametrize("name", LAYERS)
def test_copies_and_conversions(name):
    theirs, ours = pair(name, 3, 4, num_layers=2)
    x = torch.randn(5, 2, 3)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))]
    for copied in (*copies, torch.load(buffer, weights_only=False)):
        assert type(copied) is type(ours)
        same(copied(x), theirs(x))
    same(ours.double()(x.double()), theirs.double()(x.double()))
    assert ours.half().weight_hh_l1.dtype == torch.float16 and len(ours._flat_weights) == 8
    assert ours.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16
    fresh = getattr(subclasses, name)(3, 4, 2, device="meta").to_empty(device="cpu")
    fresh.load_state_dict(theirs.state_dict(), assign=True)
    same(fresh(x.double()), theirs(x.double()))
    zeros = {key: torch.zeros_like(value) for key, value in theirs.state_dict().items()}
    same(functional_call(fresh, zeros, x.double()), functional_call(theirs, zeros, x.double()))


def test_replicas_of_data_parallel():
    """As torch.nn.parallel.replicate makes them, which wants GPUs."""
    theirs, ours = pair("LSTM", 3, 4)
    replica = ours._replicate_for_data_parallel()
    assert type(replica) is subclasses.LSTM and not list(replica.parameters())
    for name, weight in ours.named_parameters():
        setattr(replica, name, weight.clone())
    x = torch.randn(5, 2, 3)
    same(replica(x), theirs(x))


@pytest.mark.parametrize("how", ["replaced", "old weight_norm", "weight_norm", "spectral_norm", "pruned"])
def test_weights_that_are_replaced_or_computed(how):
    results = []
    for module in pair("LSTM", 3, 4):
        torch.manual_seed(1)
        if how == "replaced":
            module.weight_hh_l0 = nn.Parameter(torch.randn(16, 4))
        elif how == "pruned":
            prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
        elif how == "old weight_norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                nn.utils.weight_norm(module, "weight_hh_l0")
        else:
            getattr(parametrizations, how)(module.eval(), "weight_hh_l0")
        x = torch.randn(5, 2, 3)
        results.append([step(module, x), module.state_dict()])
    same(*results)


def test_tracing_export_and_compilation():
    class Model(nn.Module):
        def __init__(self, rnn):
            super().__init__()
            self.rnn, self.head = rnn, nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.rnn(torch.relu(x))[0])

    model, x = Model(pair("LSTM", 3, 4)[1]).eval(), torch.randn(5, 2, 3)
    same(torch.jit.trace(model, (x,))(x), model(x))
    same(torch.export.export(model, (x,)).module()(x), model(x))
    same(torch.compile(model, backend="eager")(x), model(x))
    torch.compiler.reset()
    with pytest.raises(Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.compiler.reset()
    with config.patch(allow_rnn=True):
        same(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@pytest.mark.parametrize("name", CELLS)
def test_cells_compile_whole(name):
    theirs, ours = pair(name, 3, 4)
    x = torch.randn(2, 3)
    same(torch.compile(ours, backend="eager", fullgraph=True)(x), theirs(x))


def test_what_is_seqcells_already_changes_its_form_only():
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "cell": nn.GRUCell(3, 4)})
    convert(model, backend="loop", save="states", precision="ieee")
    model["before"] = seqcells.GRU(3, 4, reset_after=False, backend="reference")
    x, keys = torch.randn(5, 2, 3), list(model["before"].__dict__)
    expected = [model["lstm"](x), model["before"](x)]
    report = []
    convert(model, subclass=True, backend="aten", report=report)
    assert [str(c) for c in report] == [
        "lstm: seqcells.LSTM -> seqcells.subclasses.LSTM",
        "before: seqcells.GRU -> seqcells.subclasses.GRU",
    ]
    lstm = model["lstm"]
    assert (lstm.backend, lstm.save, lstm.precision) == ("loop", "states", "ieee")
    assert list(model["before"].__dict__) == keys and not model["before"].reset_after
    same([lstm(x), model["before"](x)], expected)
    convert(model, subclass=True, report=report)
    convert(model, report=report)  # which does not undo it
    assert type(lstm) is subclasses.LSTM and len(report) == 2
    revert(model, exclude="before")
    assert type(lstm) is nn.LSTM and type(model["cell"]) is nn.GRUCell
    same(lstm(x), expected[0])


class Own(seqcells.LSTM):
    """Somebody's, of ours, which isinstance does not take for torch.nn's."""


def test_a_subclass_of_ours_is_not_changed_to_another_form():
    report = []
    assert type(convert(Own(3, 4), subclass=True, report=report)) is Own
    assert report[0].skipped == "a subclass of seqcells.LSTM; to change it: make it one of seqcells.subclasses.LSTM"
    convert(Own(3, 4), report=report)
    assert len(report) == 1
    revert(Own(3, 4), report=report)
    remedy = f"mapping={{Yours: {__name__}.Own}}, Yours a subclass of torch.nn.LSTM"
    assert report[1].skipped == f"a subclass of seqcells.LSTM; to change it: {remedy}"


def test_parametrized_modules_change_their_form():
    theirs, ours = pair("LSTM", 3, 4)
    parametrizations.weight_norm(theirs, "weight_hh_l0")
    parametrizations.weight_norm(revert(ours), "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    for swap, cls in ((convert, seqcells.LSTM), (lambda m: convert(m, subclass=True), subclasses.LSTM)):
        swap(ours)
        assert parametrize.type_before_parametrizations(ours) is cls and isinstance(ours, cls)
        same(step(ours, x), step(theirs, x))
    assert repr(ours).startswith("seqcells.subclasses.ParametrizedLSTM(")
    revert(ours)
    same(step(ours, x), step(theirs, x))


def test_subclass_is_a_bool():
    module = nn.LSTM(3, 4)
    with pytest.raises(TypeError, match="subclass should be of type bool, got: str"):
        convert(module, subclass="yes")
    assert type(module) is nn.LSTM


# Subclasses of torch.nn's classes.


class Scaled(nn.LSTM):
    """Somebody's layer with a constructor and a forward of its own."""

    def __init__(self, scale):
        super().__init__(3, 4, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(scale))
        self.calls = 0

    def forward(self, input, hx=None):
        self.calls += 1
        return super().forward(self.scale * input, hx)


class ScaledOnOurs(Scaled, subclasses.LSTM):
    """The same on seqcells' LSTM."""


class Rewritten(seqcells.LSTM):
    """The same by hand, not an instance of torch.nn.LSTM. Its constructor is never called."""

    def __init__(self):
        raise AssertionError

    def forward(self, input, hx=None):
        self.calls += 1
        return super().forward(self.scale * input, hx)


@pytest.mark.parametrize("mine", [ScaledOnOurs, Rewritten])
@pytest.mark.parametrize("parametrized", [False, True])
def test_a_subclass_by_mapping_and_back(mine, parametrized):
    torch.manual_seed(0)
    theirs, x = Scaled(2.0), torch.randn(2, 5, 3)
    if parametrized:
        parametrizations.weight_norm(theirs, "weight_hh_l0")
    model, mapping, report = (
        nn.ModuleList([copy.deepcopy(theirs), nn.LSTM(3, 4), nn.LSTMCell(3, 4)]),
        {Scaled: mine},
        [],
    )
    parameters, scale = list(model.parameters()), model[0].scale
    convert(model, mapping=mapping, backend="loop", report=report)
    ours = model[0]
    assert parametrize.type_before_parametrizations(ours) is mine and type(model[1]) is seqcells.LSTM
    assert str(report[0]) == f"0: {__name__}.Scaled -> {__name__}.{mine.__name__}"
    assert isinstance(ours, seqcells.LSTM) and ours.backend == "loop" and ours.batch_first
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    same(step(ours, x), step(theirs, x))
    assert ours.calls == theirs.calls == 1 and ours.scale is scale
    if not parametrized:
        same(pickle.loads(pickle.dumps(ours))(x), theirs(x))
    convert(model, mapping=mapping, report=report)  # a second time
    assert len(report) == 3
    revert(model, report=report)  # all but that one, which it cannot know
    assert type(model[1]) is nn.LSTM and "Yours a subclass of torch.nn.LSTM" in report[3].skipped
    revert(model, mapping=mapping)
    assert parametrize.type_before_parametrizations(ours) is Scaled and not hasattr(ours, "backend")
    same(step(ours, x), step(theirs, x))


def test_exactly_the_class_that_mapping_names():
    class More(Scaled):
        pass

    report = []
    assert type(convert(More(1.0), mapping={Scaled: ScaledOnOurs}, report=report)) is More
    name = f"{__name__}.{More.__qualname__}"
    remedy = f"mapping={{{name}: Yours}}, Yours a subclass of seqcells.LSTM"
    assert report[0].skipped == f"a subclass of torch.nn.LSTM; to change it: {remedy}"
    convert(More(1.0), subclass=True, report=report)
    assert report[1].skipped.endswith("Yours a subclass of seqcells.subclasses.LSTM")


def test_torchs_own_class_by_mapping():
    """{nn.LSTM: Mine} makes every plain one the user's."""
    module = convert(nn.LSTM(3, 4), mapping={nn.LSTM: Own})
    assert type(module) is Own and type(revert(module, mapping={nn.LSTM: Own})) is nn.LSTM


class Empty(ABC, nn.RNNBase):
    """What forecasting libraries add: sequences of no step, whose state stays what it was."""

    @abstractmethod
    def kept(self, mask, state, start): ...

    def forward(self, x, hx, lengths):
        packed = pack_padded_sequence(x, lengths.clamp(min=1), batch_first=True, enforce_sorted=False)
        y, state = super().forward(packed, hx=hx)
        y, _ = pad_packed_sequence(y, batch_first=True)
        return y, self.kept((lengths == 0)[None, :, None], state, hx)


class EmptyLSTM(Empty, nn.LSTM):
    def kept(self, mask, state, start):
        return tuple(torch.where(mask, b, a) for a, b in zip(state, start, strict=True))


class EmptyLSTMOnOurs(EmptyLSTM, subclasses.LSTM):
    pass


def test_an_abstract_mixin_of_somebodys_on_ours():
    torch.manual_seed(0)
    theirs = EmptyLSTM(3, 4, batch_first=True)
    ours = convert(copy.deepcopy(theirs), mapping={EmptyLSTM: EmptyLSTMOnOurs})
    made = EmptyLSTMOnOurs(3, 4, batch_first=True)
    made.load_state_dict(theirs.state_dict())
    x, hx, lengths = torch.randn(3, 5, 3), tuple(torch.randn(2, 1, 3, 4)), torch.tensor([5, 0, 2])
    for module in (ours, made):
        assert isinstance(module, EmptyLSTM)
        same(module(x, hx, lengths), theirs(x, hx, lengths))


@pytest.mark.parametrize("swap", [convert, revert])
@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ([(Scaled, Own)], r"mapping must be a dict of classes, \{Theirs: Mine\}, or None, got a list of 1"),
        ({Scaled: "Own"}, r"mapping must be a dict of classes, \{Theirs: Mine\}, or None, got \{.*'Own'"),
        ({nn.Linear: Own}, r"mapping: its keys must be subclasses of torch.nn.LSTM, .*, got torch.nn.*Linear"),
        ({Own: Own}, r"mapping: its keys must be .*, got .*\.Own"),
        ({Scaled: seqcells.GRU}, r"mapping: .*\.Scaled must become a subclass of seqcells.LSTM, got seqcells.GRU"),
        ({Scaled: nn.LSTM}, r"mapping: .*\.Scaled must become a subclass of seqcells.LSTM, got torch.nn.LSTM"),
        ({nn.GRUCell: seqcells.GRU}, "mapping: torch.nn.GRUCell must become a subclass of seqcells.GRUCell"),
        ({EmptyLSTM: Own}, r"a subclass of both, class Own\(EmptyLSTM, seqcells.subclasses.LSTM\)"),
    ],
)
def test_wrong_mappings_change_nothing(swap, mapping, words):
    model = nn.ModuleList([Scaled(1.0), nn.GRUCell(3, 4), seqcells.LSTM(3, 4)])
    before = [type(m) for m in model]
    with pytest.raises(TypeError, match=words):
        swap(model, mapping=mapping)
    assert [type(m) for m in model] == before


def test_a_mapping_that_cannot_be_reverted():
    with pytest.raises(ValueError, match=r"mapping: .*\.Own stands for two classes: revert needs one for each"):
        revert(Own(3, 4), mapping={nn.LSTM: Own, Scaled: Own})


def test_after_fully_shard(caplog):
    """In one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4)), torch.randn(5, 2, 3)
    ours = convert(copy.deepcopy(model))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for each in (model, ours):
            fully_shard(each[1], mesh=mesh)
            fully_shard(each, mesh=mesh)
        same(ours(x), model(x))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "seqcells"):
            convert(model)
            revert(ours)
    finally:
        dist.destroy_process_group()
    assert isinstance(model[1], nn.LSTM) and isinstance(ours[1], seqcells.LSTM)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("fully_shard changed its class: call convert or revert before" in m for m in said)
