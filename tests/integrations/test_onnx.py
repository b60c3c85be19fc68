"""ONNX, by both exporters: onnxruntime returns eager's numbers, for batches of any size."""

import warnings
from itertools import product

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import seqcells
from seqcells.testing import TOLERANCE, relative

pytestmark = pytest.mark.integrations
T, I, H = 4, 3, 4  # noqa: E741
OPTIONS = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "two layers": {"num_layers": 2, "dropout": 0.5},
    "both, batch first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False},
}
DEEP = "both, batch first"
KINDS = {"LSTM": ("LSTM", {}), "GRU": ("GRU", {}), "RNN": ("RNN", {}), "RNN-relu": ("RNN", {"nonlinearity": "relu"})}


class Net(nn.Module):
    """All a layer gives, and its resets as an input of the program if there are some."""

    def __init__(self, layer):
        super().__init__()
        self.rnn, self.head = layer, nn.Linear(H * (2 if layer.bidirectional else 1), 2)

    def forward(self, x, resets=None):
        y, states = self.rnn(x) if resets is None else self.rnn(x, resets=resets)
        return self.head(y), *(states if isinstance(states, tuple) else (states,))


def inputs(layer, batch, resets):
    torch.manual_seed(batch)
    shape = (batch, T) if layer.batch_first else (T, batch)
    return (torch.randn(*shape, I), *([torch.rand(*shape) < 0.3] if resets else []))


def exported(net, arguments, dynamo, file):
    """The program, with a batch of any size."""
    axis = 0 if net.rnn.batch_first else 1
    names = ["x", "resets"][: len(arguments)]
    if dynamo:
        batch = torch.export.Dim("batch", min=2, max=4096)
        how = {"dynamic_shapes": {name: {axis: batch} for name in names}}
    else:
        outputs = ["y", "h", "c"][: 3 if isinstance(net.rnn, seqcells.LSTM) else 2]
        axes = {name: {axis: "batch"} for name in [*names, "y"]} | {name: {1: "batch"} for name in outputs[1:]}
        how = {"input_names": names, "output_names": outputs, "dynamic_axes": axes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the older exporter is deprecated, and such
        torch.onnx.export(net, arguments, file, dynamo=dynamo, verbose=False, **how)
    return onnx.load(file)


def check(layer, dynamo, tmp_path, resets=False):
    net = Net(layer).eval()
    file = tmp_path / "net.onnx"
    program = exported(net, inputs(layer, 3, resets), dynamo, file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (3, 5):
        arguments = inputs(layer, batch, resets)
        given = {i.name: a.numpy() for i, a in zip(session.get_inputs(), arguments, strict=True)}
        with torch.no_grad():
            expected = net(*arguments)
        for got, e in zip(session.run(None, given), expected, strict=True):
            assert relative(torch.from_numpy(got), e) <= TOLERANCE[torch.float32]
    return [node.op_type for node in program.graph.node]


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize(("kind", "options"), [*product(["LSTM", "GRU", "RNN"], OPTIONS), ("RNN-relu", "plain")])
def test_a_layer_is_one_node_a_layer(kind, options, dynamo, tmp_path):
    """onnx's own LSTM, GRU and RNN, of a model that was converted; torch's newer exporter has no RNN."""
    name, more = KINDS[kind]
    torch.manual_seed(0)
    layer = seqcells.convert(getattr(nn, name)(I, H, **more, **OPTIONS[options]))
    ran = check(layer, dynamo, tmp_path)
    assert ran.count(name) == (0 if dynamo and name == "RNN" else layer.num_layers)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("options", ["plain", DEEP])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_resets(kind, options, dynamo, tmp_path):
    """Not in onnx's nodes: the steps by themselves."""
    name, more = KINDS[kind]
    torch.manual_seed(0)
    check(getattr(seqcells, name)(I, H, **more, **OPTIONS[options]), dynamo, tmp_path, resets=True)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("options", ["plain", DEEP])
@pytest.mark.parametrize("resets", [False, True])
def test_the_reset_gate_before_the_product(options, resets, dynamo, tmp_path):
    """Not onnx's default; some runtimes have it as linear_before_reset=0, which torch's exporters do not write."""
    torch.manual_seed(0)
    check(seqcells.GRU(I, H, reset_after=False, **OPTIONS[options]), dynamo, tmp_path, resets)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(kind, dynamo, tmp_path):
    torch.manual_seed(0)
    cell, x = seqcells.convert(getattr(nn, kind)(I, H)).eval(), torch.randn(3, I)
    file = tmp_path / "cell.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(cell, (x,), file, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    expected = cell(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, e in zip(session.run(None, {session.get_inputs()[0].name: x.numpy()}), expected, strict=True):
        assert relative(torch.from_numpy(got), e.detach()) <= TOLERANCE[torch.float32]
