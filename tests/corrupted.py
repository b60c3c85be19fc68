"""Launches of kernels that go wrong, for tests of what notices it."""

import time
import warnings

import torch

from seqcells import testing
from seqcells.kernels import scan, single, stack

# By kernel, what it gives. Schedules but `resident` keep the last states and their gradients in scratch buffers.
OUTPUTS = {
    "forward": ("y_ptr", "c_ptr", "hn_ptr", "cn_ptr", "saved_ptr"),
    "backward": ("dgx_ptr", "dhu_ptr", "m_ptr", "dparams_ptr", "dh0_ptr", "dc0_ptr"),
}
SCRATCH = {"hn_ptr": "sh_ptr", "cn_ptr": "sc_ptr", "dh0_ptr": "dsh_ptr", "dc0_ptr": "dsc_ptr"}


def schedule_of(launch):
    return launch.kernel.fn.__module__.rpartition(".")[2].removesuffix("_backward")


def kernel_of(launch):
    """forward or backward; kernel, of a step or of what recomputes."""
    return launch.kernel.fn.__name__.removesuffix("_kernel")


class Corrupted:
    """Launches, of which those of some schedules and one kernel go wrong.

    how: the name of an output, of which one element is wrong after the kernel's last launch; or "gates" (the first two
    products are exchanged), "mask" (it is ignored), "step" (one is left out), "slow" (late, but right) or "hang" (it
    never ends: nothing in a process notices, only whoever can end it, as benchmarks/jobs.py). seed: which element.
    wrong, right: how many launches went wrong, and the schedules of the others.
    """

    def __init__(self, monkeypatch, how, kernel, schedules=("resident", "grid", "stepwise", "single"), seed=0):
        self.how, self.kernel, self.schedules, self.seed, self.run = how, kernel, schedules, seed, scan.run
        self.wrong, self.right, self.last = 0, [], None
        monkeypatch.setattr(scan, "run", self)
        for launcher in (scan.forward, scan.backward, scan.recompute, single.forward, stack.forward, stack.backward):
            monkeypatch.setitem(launcher.__kwdefaults__, "launch", self)

    def __call__(self, launch):
        if schedule_of(launch) not in self.schedules or kernel_of(launch) != self.kernel:
            self.right.append(schedule_of(launch))
            self.run(launch)
            return
        given, T = dict(launch.arguments), launch.arguments.get("T", 1)
        at = given.get("t", given.get("first", 0))
        if self.how in ("slow", "hang"):
            time.sleep(0.01 if self.how == "slow" else 1e6)
        elif self.how == "gates":
            u, H = given["u_ptr"].clone(), given["H"]
            u[..., :H, :], u[..., H : 2 * H, :] = given["u_ptr"][..., H : 2 * H, :], given["u_ptr"][..., :H, :]
            given["u_ptr"] = u
        elif self.how == "mask":
            given["mask_ptr"] = None
        elif self.how == "step":
            if "t" in given or given.get("last") == at + 1:  # a launch for each step
                self.wrong += at == 1
                return None if at == 1 else self.run(launch)
            given["T"] = T - 1
        self.run(launch._replace(arguments=given))
        self.wrong += 1
        final = -1 if self.kernel == "backward" and "t" in given else T - 1
        if self.how.endswith("_ptr") and (at == final or ("t" not in given and "first" not in given)):
            self._corrupt(given)

    def _corrupt(self, given):
        wrong = given[self.how if given.get(self.how) is not None else SCRATCH[self.how]]
        if wrong.dtype == torch.int64:  # packed
            wrong = wrong.view(given["y_ptr"].dtype)
        place = torch.randint(wrong.numel(), (), generator=torch.Generator().manual_seed(self.seed))
        wrong = wrong.view(-1)[place]
        if wrong != self.last:  # a later launch may not have written it again
            wrong.copy_(-wrong - 1)
            self.last = wrong.item()


def trained(module, x, call=None, **how):
    """All results and gradients, of call instead of module if given."""
    x = x.detach().requires_grad_()
    y, state = (module if call is None else call)(x, **how)
    outputs = [y, *(state if isinstance(state, tuple) else (state,))]
    loss = sum((o.double() ** 2).sum() for o in outputs)
    return [o.detach() for o in outputs] + list(torch.autograd.grad(loss, [x, *module.parameters()]))


def told(call, *arguments, **options):
    """The result, and the warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call(*arguments, **options)
    return result, [str(w.message) for w in found if w.category is RuntimeWarning]


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert testing.relative(a.detach(), b.detach()) <= testing.TOLERANCE[b.dtype]
