"""xlstm: an sLSTM with its weights computes what its own implementation in PyTorch does, heads and gradients too."""

import pytest
import torch
from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

import seqcells
from seqcells import interop

pytestmark = pytest.mark.integrations
T, B, H = 7, 3, 12


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("backend", ["loop", "triton"])
def test_slstm(heads, backend):
    torch.manual_seed(0)
    config = sLSTMCellConfig(
        hidden_size=H, num_heads=heads, backend="vanilla", dtype="float32", enable_automatic_mixed_precision=False,
        output_shape="BSH", recurrent_weight_init="standard",
    )  # fmt: skip
    theirs = sLSTMCell(config)
    kernel = theirs._recurrent_kernel_int2ext(theirs._recurrent_kernel_.detach())
    bias = theirs._bias_int2ext(theirs._bias_.detach())
    layer = seqcells.Recurrent("slstm", 4 * H, H, batch_first=True, heads=heads, backend=backend)
    interop.load_(layer, interop.from_xlstm(kernel, bias))
    x = (3 * torch.randn(B, T, 4 * H)).requires_grad_()
    y, expected = layer(x)[0], theirs(x)[0].reshape(B, T, H)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(y)
    ours, others = (torch.autograd.grad((o * weights).sum(), x)[0] for o in (y, expected))
    torch.testing.assert_close(ours, others, rtol=1e-3, atol=1e-5)
