"""`with seqcells.backend(...)`: the choice is the thread's or the task's, under torch.compile and in backward, too."""

import asyncio
import threading
from contextlib import ExitStack

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import seqcells
from seqcells import autograd, backends, chosen

T = 12  # steps at which torch's own, the loop and the reference compile to different graphs


def now():
    return backends.spelled(None)


def in_threads(*functions):
    """Runs each in a thread of its own; raises what any of them raises."""
    raised = []

    def run(function):
        try:
            function()
        except BaseException as e:
            raised.append(e)

    threads = [threading.Thread(target=run, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for e in raised:
        raise e


def test_threads_that_overlap_keep_their_own_choice():
    barrier, seen = threading.Barrier(2, timeout=30), {}

    def first():
        with seqcells.backend("loop"):
            barrier.wait()  # both are in
            barrier.wait()
            seen["first, while both"] = now()
        barrier.wait()  # the first is out, the second is in
        barrier.wait()
        seen["first, after"] = now()

    def second():
        seen["second, before"] = now()
        barrier.wait()
        with seqcells.backend("aten"):
            barrier.wait()
            barrier.wait()
            seen["second, alone"] = now()
        barrier.wait()
        seen["second, after"] = now()

    with seqcells.backend("reference"):
        in_threads(first, second)
        assert now() == "reference"
    assert seen == {
        "first, while both": "loop",
        "first, after": "auto",
        "second, before": "auto",
        "second, alone": "aten",
        "second, after": "auto",
    }
    assert now() == "auto"


@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_what_one_thread_asks_for_breaks_no_other(name):
    module, x = getattr(seqcells, name)(3, 4, reset_after=False), torch.randn(5, 3)

    def work():
        module(x)

    with seqcells.backend("aten"):
        with pytest.raises(RuntimeError, match="torch has no fused gru_before"):
            work()
        in_threads(work)


def test_tasks_keep_their_own_choice():
    async def task(name):
        with seqcells.backend(name):
            await asyncio.sleep(0)
            inner = await asyncio.create_task(asyncio.sleep(0, now()))
            return now(), inner, await asyncio.to_thread(now)

    async def both():
        return await asyncio.gather(task("loop"), task("aten")), now()

    assert asyncio.run(both()) == ([("loop",) * 3, ("aten",) * 3], "auto")


def test_each_exit_restores_what_its_entry_found():
    first, second = seqcells.backend("loop"), seqcells.backend("aten")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert now() == "auto"
    second.__exit__(None, None, None)
    assert now() == "loop"
    with seqcells.backend("auto"), ExitStack() as stack:
        stack.enter_context(seqcells.backend("reference"))
        later = stack.pop_all()
        assert now() == "reference"
        later.close()
        assert now() == "auto"
    assert now() == "loop"
    chosen.backend = "auto"


def test_a_generator_shows_its_choice_to_its_caller():
    def steps():
        with seqcells.backend("loop"):
            yield now()
        yield now()

    generator = steps()
    assert (next(generator), now(), next(generator), now()) == ("loop", "loop", "auto", "auto")


@seqcells.backend("loop")
def decorated():
    return now()


def test_a_function_decorated_chooses_at_each_call():
    assert (decorated(), now(), decorated()) == ("loop", "auto", "loop")


# --- torch.compile ----------------------------------------------------------------------------------------------------


class Noting:
    """A compiler of graphs that notes, at each call of a compiled one, which backend's it is."""

    def __init__(self):
        self.compiled, self.ran = 0, []

    def __call__(self, module, inputs):
        self.compiled += 1
        code = module.print_readable(print_output=False)
        name = "loop" if "scan_forward" in code else "aten" if "onednn" in code else "reference"

        def run(*arguments):
            self.ran.append(name)
            return module(*arguments)

        return run


@pytest.fixture
def noting():
    torch._dynamo.reset()
    yield Noting()
    torch._dynamo.reset()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = seqcells.LSTM(3, 4)

    def forward(self, x):
        return self.layer(x)[0]


def call(function, x, *names):
    for name in names:
        with torch.no_grad(), seqcells.backend(name):
            function(x)


@pytest.mark.parametrize("kind", ["function", "module"])
def test_compiled_it_follows_the_choice_of_each_call(kind, noting):
    net, x = Net(), torch.randn(T, 2, 3)
    function = torch.compile(net if kind == "module" else lambda x: net(x), fullgraph=True, backend=noting)
    names = ["loop", "aten", "reference"]
    call(function, x, *names)
    assert noting.compiled == 3
    call(function, x, *names, *reversed(names), *names)
    assert noting.ran == [*names, *names, *reversed(names), *names]
    with seqcells.backend("loop"):
        in_threads(lambda: call(function, x, *names))
        barrier = threading.Barrier(2, timeout=30)
        noting.ran.clear()

        def other():
            with seqcells.backend("reference"):
                barrier.wait()  # while this one is in, the main thread's loop is, too
                call(function, x, now())
                barrier.wait()

        thread = threading.Thread(target=other)
        thread.start()
        barrier.wait()
        call(function, x, now())
        barrier.wait()
        thread.join()
    assert sorted(noting.ran) == ["loop", "reference"] and noting.compiled == 3


def test_compiled_in_two_threads_each_runs_its_own(noting):
    net, x = Net(), torch.randn(T, 2, 3)
    function = torch.compile(net, fullgraph=True, backend=noting)
    in_threads(*(lambda name=name: call(function, x, *[name] * 3) for name in ("loop", "aten")))
    assert sorted(noting.ran) == ["aten"] * 3 + ["loop"] * 3


def test_compiled_it_follows_the_task(noting):
    net, x, seen = Net(), torch.randn(T, 2, 3), []
    function = torch.compile(net, fullgraph=True, backend=noting)

    async def task(name):
        with seqcells.backend(name):
            for _ in range(2):
                await asyncio.sleep(0)
                call(function, x, now())
                seen.append(name)

    async def both():
        await asyncio.gather(task("loop"), task("reference"))

    asyncio.run(both())
    assert noting.ran == seen == ["loop", "reference"] * 2


def test_a_choice_within_what_is_compiled(noting):
    net, x = Net(), torch.randn(T, 2, 3)

    def choosing(x):
        with seqcells.backend("reference"):
            return net(x) if now() == "reference" else None

    def around(x):
        y = choosing(x)
        assert now() == "loop"
        return y, net(x)

    function = torch.compile(around, fullgraph=True, backend=noting)
    for _ in range(2):
        with seqcells.backend("loop"):
            torch.testing.assert_close(function(x), around(x))
            assert now() == "loop"
    assert noting.compiled == 1 and now() == "auto"
    call(torch.compile(choosing, fullgraph=True, backend=noting), x, "loop", "aten")
    assert noting.ran == ["loop"] * 2 + ["reference"] * 2


# --- backward ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch):
    """What the loop engine is called for."""
    found, engine = [], autograd.ENGINES["loop"]

    def noted(name):
        run = getattr(engine, name)
        return lambda *a: (found.append(name), run(*a))[1]

    monkeypatch.setitem(autograd.ENGINES, "loop", engine._replace(**{n: noted(n) for n in ("forward", "backward")}))
    return found


def test_backward_in_another_thread_is_the_forwards(engine):
    layer, x = seqcells.GRU(3, 4), torch.randn(T, 2, 3, requires_grad=True)
    with seqcells.backend("loop"):
        y, _ = layer(x)

    def back():
        with seqcells.backend("aten"):
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            dx.square().sum().backward()

    in_threads(back)
    assert engine[0] == "forward" and "backward" in engine and x.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_recomputes_with_the_choice_where_backward_is_called(reentrant, engine):
    layer, x = seqcells.GRU(3, 4), torch.randn(T, 2, 3, requires_grad=True)

    def train():
        with seqcells.backend("loop"):
            checkpoint(lambda x: layer(x)[0], x, use_reentrant=reentrant).sum().backward()

    with seqcells.backend("aten"):
        in_threads(train)
    assert engine == ["forward", "forward", "backward"]


class Deep(torch.autograd.Function):
    """Its backward calls backward, `depth` times: the sixty-first in a thread of the engine's own. Then it asks."""

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.depth:
            with torch.enable_grad():
                y = Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.seen)
            torch.autograd.backward(y)
        else:
            ctx.seen.append((threading.get_ident(), now()))
        return grad, None, None


@pytest.mark.skipif(not hasattr(torch._C, "_remove_obj_from_tls"), reason="PyTorch hands no context on")
def test_a_thread_of_the_engine_has_the_choice_of_who_called_backward():
    seen = []
    for name in ("loop", "reference", "auto"):
        with seqcells.backend(name):
            Deep.apply(torch.ones(1, requires_grad=True), 61, seen).backward()
    assert [name for _, name in seen] == ["loop", "reference", "auto"]
    assert threading.get_ident() not in [thread for thread, _ in seen]


# --- DataLoader -------------------------------------------------------------------------------------------------------


class Names(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        found = now()
        with seqcells.backend("reference"):
            return found, now()


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader(start):
    """A forked one starts with a copy of the choice, a spawned one with "auto"."""
    with seqcells.backend("loop"):
        loader = iter(DataLoader(Names(), batch_size=None, num_workers=1, multiprocessing_context=start))
        found = [next(loader)]
    with seqcells.backend("aten"):
        found.append(next(loader))
    first = "loop" if start == "fork" else "auto"
    assert [tuple(f) for f in found] == [(first, "reference")] * 2
