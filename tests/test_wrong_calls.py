"""Wrong calls of everything public: TypeError, ValueError or RuntimeError, by a check that names the argument.

The correct calls are in right_calls.py, the wrong values in wrong_values.py. A call that turns out correct is fine.
"""

import inspect
import linecache
import re
import warnings
from random import Random

import pytest
import torch
from right_calls import ENTRIES
from wrong_values import broken, without_a_parameter

from seqcells.convert import CELLS, LAYERS

pytestmark = pytest.mark.filterwarnings("ignore:dropout option")

# What torch.nn and Keras call arguments, and modules their options.
OTHER_NAMES = (
    r"input|hx|cx|hidden\d?|parameter|(weight|bias)_(ih|hh|hr)\w*|batch_sizes|(un)?sorted_indices|sequence length|"
    r"(recurrent_)?kernel|bias|backend"
)
# What torch says where it names none.
TORCH_WORDS = (
    r"mat1 and mat2 must have the same dtype, but got \w+ and \w+|lstm expects two hidden states|"
    r"Only Tensors of floating point and complex dtype can require gradients|"
    r"Expected one of cpu, cuda, .* device type at start of device string.*|Invalid device string: .*|"
    r"Device string must not be empty|Cannot access accelerator device when none is available.|"
    r"Device index must not be negative|Length of all samples has to be greater than 0, .*"
)
# What Python says of a call's form, or of that of a function that was given.
CALL = (
    r"missing \d+ required|got an unexpected keyword argument|got multiple values for|"
    r"takes \d+ positional arguments? but \d+ were given"
)
# What only somebody who ran into something says.
INTERNAL = (
    r"has no attribute|subscriptable|ambiguous|index out of range|list index|unpack|(?<!got: )NoneType|has no len|"
    r"not iterable|unhashable|not supported between|invalid combination|unsupported operand|not callable|"
    r"index_select|[Ii]nternal|INTERNAL|could not convert|has no element|cannot be interpreted|not implemented for|"
    r"out of bounds"
)
# What is refused of right calls: that a backend has not got something.
LACKING = r"the aten backend (cannot run this|takes lengths only)|Length of all samples has to be greater than 0"


def named(call):
    """A pattern of all that names an argument of the call."""
    found = set(call.arguments)
    for value in list(call.arguments.values()):
        if isinstance(value, dict):
            found |= {k for k in value if isinstance(k, str)}
    function = call.function
    found |= set(inspect.signature(function).parameters)
    return rf"\b({'|'.join(map(re.escape, sorted(found)))}|{OTHER_NAMES})\b"


def by_a_check(error):
    """Whether a statement of seqcells raised it, and not something that it ran into."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip()
    return line.startswith("raise")


def snapshot(module):
    """All that a wrong call must leave as it is."""
    if module is None:
        return None
    return [(n, type(m), list(m.__dict__), list(m._parameters)) for n, m in module.named_modules()], [
        (n, p._version, id(p)) for n, p in module.named_parameters()
    ]


def refusal(call, error):
    """What is wrong with how a call was refused; "" if nothing."""
    message, kind = str(error), type(error).__name__
    if isinstance(error, TypeError) and re.search(CALL, message):
        return ""
    if not isinstance(error, (TypeError, ValueError, RuntimeError)):
        return f"{kind}: {message}"
    if re.search(INTERNAL, message) or not message:
        return f"internal {kind}: {message}"
    if re.fullmatch(TORCH_WORDS, message):
        return ""
    if not re.search(named(call), message):
        return f"names nothing {kind}: {message}"
    return "" if by_a_check(error) else f"run into {kind}: {message}"


def problem(call):
    """What is wrong with how it was refused; "" if nothing, None if it was not."""
    before = snapshot(call.target)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.function(**call.arguments)
        return None
    except Exception as error:
        found = refusal(call, error)
    return found or ("" if snapshot(call.target) == before else "it changed something")


def mutated(random):
    """A right call with one or two of its arguments wrong, or one missing, unknown, or in another's place."""
    call = random.choice(ENTRIES)(random)
    if isinstance(call.function, tuple((LAYERS | CELLS).values())) and random.random() < 0.15:
        call.function = without_a_parameter(random, call.function)
    given, how = call.arguments, random.random()
    first, *rest = random.sample(list(given), min(2, len(given)))
    if how < 0.04:
        del given[first]
    elif how < 0.07:
        given["unknown"] = 5
    elif how < 0.14 and rest:
        given[first], given[rest[0]] = given[rest[0]], given[first]
    else:
        for name in (first, *rest)[: random.choice([1, 1, 2])]:
            given[name] = broken(random, given[name])
    return call


def wrong_calls(seed, count):
    """Each problem found, and how many calls were refused as they should be."""
    random, found, refused = Random(seed), [], 0
    torch.manual_seed(seed)
    for number in range(count):
        call = mutated(random)
        what = problem(call)
        refused += what == ""
        if what:
            found.append(f"{seed}.{number} {call.entry}: {what}")
    return found, refused


@pytest.mark.parametrize("count", [300, pytest.param(8000, marks=pytest.mark.slow)])
def test_wrong_calls(count):
    found, refused = wrong_calls(0, count)
    assert not found, "\n".join([str(len(found)), *found])
    assert refused > 0.7 * count


@pytest.mark.parametrize("seed", range(3))
def test_the_calls_are_right(seed):
    """Before anything is broken: else a refusal would say nothing of what was."""
    random = Random(seed)
    torch.manual_seed(seed)
    for entry in ENTRIES:
        for _ in range(10):
            call = entry(random)
            try:
                call.function(**call.arguments)
            except RuntimeError as error:
                assert re.match(LACKING, str(error)), call.entry


def test_no_argument_takes_anything():
    random, taken = Random(0), set()
    torch.manual_seed(0)
    for _ in range(1500):
        call = random.choice(ENTRIES)(random)
        name = random.choice(list(call.arguments))
        call.arguments[name] = object()
        if (what := problem(call)) != "":
            taken.add(f"{call.entry}, {name}: {what}")
    assert not taken, "\n".join(sorted(taken))
