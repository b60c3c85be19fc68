"""The barrier between the programs of one tile, as a small model whose every interleaving is tried.

Modelled: the programs of a cooperative launch, their warps, and what each warp does in a step (`program`, below). A
warp owns one hidden unit. It knows some stores for certain: its own, those its program knew at the last block barrier,
and those that a release covered before its acquire. Every other store is pending, to become visible at any time and in
any order: a load may return whatever lies between the newest store its warp knows and the newest one made. A release
covers all that its warp knows; an acquire gets all that was released into the counter so far (adds and polls are both
read-modify-writes, and so the counter is one release sequence). A value is the number of its step, so that a load can
check that it gets just that. The work between arriving and waiting is on nothing shared, and so it is only that other
warps may move between the two.

A load that is not .cg goes through an L1 cache, one a program, which is as bad as can be: what is in it may come back
at any time, an acquire does not empty it, and a line holds the whole buffer, so that a load brings in what it did not
ask for.

Where the values of y are their own flags, a look is loads that are made again until nothing they return is all ones:
the fill, step -1, and the start, step 0, since h0 may be anything. Loads that return all ones leave nothing behind, and
so only the last ones are a move. They may be made once all units have something else, and may return whatever else lies
between, as above. To a look, an L1 cache that is as bad as can be gives for ever what is in it.

Not modelled: arithmetic, more than one unit a warp, a load that is still under way at the next block barrier (an
asynchronous copy), a store made before an earlier load or wait of its own warp, an overflow of the counter, the time a
poll takes, what the compiler makes of the kernel, part of a unit's value (an element is stored and loaded whole).
"""

from collections import deque

import pytest


def program(steps, exchanges, programs, leader=True, without="", published=False, each=True, sums=False, flagged=0):
    """What one warp does in a launch. Of the two warps of a program the first is the leader. published: the first
    exchange of a step goes through v, else through y. each: every warp polls for itself (CUDA), or the leader, with a
    block barrier after it. sums: a step also exchanges sums for a mean, in one buffer and with a counter of its own.
    flagged: the values of y are their own flags. 1: a counter is waited for first, which orders nothing. 2: none is."""
    code, barriers = [], 0

    def barrier():
        nonlocal barriers
        barriers += 1  # the counter is never reset: barrier n is open once every program arrived n times
        arrivals = programs * barriers - (without == "the last arrival")
        if flagged:  # no block barrier: a program is counted in when its first warp has stored
            return [*[("arrive", "relaxed")] * leader, ("wait", "relaxed", arrivals)] if flagged == 1 else []
        arrive = ("arrive", "relaxed" if without == "release" else "release")
        wait = ("wait", "relaxed" if without == "acquire" else "acquire", arrivals)
        if each:
            return [("block", "before"), *([arrive] if leader else []), wait]
        return [("block", "before"), *([arrive, wait] if leader else []), ("block", "after")]

    for t in range(steps):
        # y has a row for every step, so that a store into it takes nothing from a slower program. m is one buffer, and
        # v is two.
        row, next_row = (0, 0) if without == "rows of y" else (t, t + 1)
        if published:
            row = 0 if without == "two of v" else t % 2
            code += [("store", "v", row, t)]
            if without != "the barrier before v":
                code += barrier()
            code += [("load", "v", row, t)]
        else:
            # What was there before the launch is taken as it is.
            look = flagged and without != "the look" and (t or without == "the start as it is")
            code += [("look" if look else "load", "y", row, t)]
        if sums:
            wait = [] if without == "the wait for s" else [("wait", "acquire", programs * (t + 1), "sums")]
            code += [("store", "s", 0, t), ("block", "before")]
            code += [("arrive", "release", "sums")] * leader + wait + [("load", "s", 0, t)]
        if exchanges == 2:
            code += [("store", "m", 0, t), *barrier(), ("load", "m", 0, t)]
        if not published:
            code += [("store", "y", next_row, t + 1)]
            if without != "the barrier after y":
                code += barrier()
    return [line for line in code if " ".join(line[:2]) != without and line[0] != without]


def put(items, i, item):
    return (*items[:i], item, *items[i + 1 :])


class Model:
    """Launches, and what the warps in them may do next.

    A state is, of each warp, its next line and its view; the newest stores; of each counter, the arrivals and the view
    released into it; and what is in each program's cache. A view is the newest step of each place, -1 before the first.
    """

    def __init__(
        self, programs, warps, steps, exchanges, without, resident, launches, counters, published, each, sums, flagged
    ):
        self.programs, self.warps, self.without, self.counters = programs, warps, without, counters or launches
        self.crews = [range(p * warps, (p + 1) * warps) for p in range(launches * programs)]
        self.code = [
            program(steps, exchanges, programs, w == crew[0], without, published, each, sums, flagged)
            for crew in self.crews
            for w in crew
        ]
        self.resident = resident or len(self.crews)
        rows = [*([("v", 0), ("v", 1)] if published else [("y", t) for t in range(steps + 1)]), ("m", 0)]
        rows += [("s", 0)] * sums
        each = ((*row, w) for w in range(len(self.code)) for row in rows)
        self.places = {place: i for i, place in enumerate(each)}
        # The values each place ever has.
        self.values = [{0 if place[:2] == ("y", 0) else -1} for place in self.places]
        for w, code in enumerate(self.code):
            for _, buffer, row, step in (line for line in code if line[0] == "store"):
                self.values[self.places[buffer, row, w]].add(step)
        # All ones are the fill and, since h0 may be anything, the start.
        ones = {-1: without != "the fill", 0: True, 1: without == "the other NaN"}
        self.ones = {value for value in ones if flagged and ones[value]}

    def first(self):
        """The state before any move."""
        n, counters = len(self.code), 2 * self.counters  # the second half: of sums
        empty = tuple(0 if (buffer, row) == ("y", 0) else -1 for buffer, row, _ in self.places)
        arrived = self.programs if self.without == "a counter at zero" else 0
        cached = (frozenset(),) * len(self.crews)
        return (0,) * n, (empty,) * n, (empty,), (arrived,) * counters, (empty,) * counters, cached

    def ended(self, at, p):
        return all(at[w] == len(self.code[w]) for w in self.crews[p])

    def line(self, state, w):
        """What warp w does next, in words."""
        return f"{w // self.warps}.{w % self.warps} {' '.join(map(str, self.code[w][state[0][w]]))}"

    def move(self, state, w):
        """What may go wrong in the next line of warp w, and the state after it; None where it has to wait."""
        at, knows, (made,), counts, released, cached = map(list, state)
        code, crews, p = self.code, self.crews, w // self.warps
        counter = p // self.programs % self.counters
        ended = sum(self.ended(at, q) for q in range(len(crews)))
        if at[w] == len(code[w]) or p >= self.resident + ended:
            return None
        wrong = set()
        match code[w][at[w]]:
            case (("load" | "look"), *_):
                wrong = self.load(w, code[w][at[w]], knows[w], made, cached)
                if wrong is None:
                    return None
            case "store", buffer, row, step:
                place = self.places[buffer, row, w]
                made, knows[w] = put(made, place, step), put(knows[w], place, step)
            case "block", _:  # one move for the whole program, made when all its warps are there
                if any(at[v] == len(code[v]) or code[v][at[v]][0] != "block" for v in crews[p]) or w != crews[p][0]:
                    return None
                together = tuple(max(known) for known in zip(*(knows[v] for v in crews[p]), strict=True))
                for v in crews[p]:
                    at[v], knows[v] = at[v] + (v != w), together
            case "arrive", order, *of:
                counter += self.counters * bool(of)
                counts[counter] += 1
                if order == "release":
                    released[counter] = tuple(map(max, released[counter], knows[w]))
            case "wait", order, arrivals, *of:
                counter += self.counters * bool(of)
                if counts[counter] < arrivals:
                    return None
                if order == "acquire":
                    knows[w] = tuple(map(max, knows[w], released[counter]))
        at[w] += 1
        return wrong, tuple(map(tuple, (at, knows, (made,), counts, released, cached)))

    def load(self, w, line, known, made, cached):
        """What may go wrong in a load or a look; None if a look goes on. Adds to `cached` what it leaves in the cache
        of warp w's program."""
        kind, buffer, row, step = line
        p, places, wrong = w // self.warps, self.places, set()
        units = self.programs * self.warps  # of a launch
        first = w // units * units
        # All units in one move. A load changes nothing (but for the cache), so if one unit can be wrong at some time
        # between the others, the search sees it where they are all loaded at that time; or, for a look, later, since
        # what a unit may return only grows until the warp goes on.
        for v in range(first, first + units):
            place = places[buffer, row, v]
            may = {value for value in self.values[place] if known[place] <= value <= made[place]}
            old = {value for value in range(-1, step) if (place, value) in cached[p]}
            if kind == "look":
                may -= self.ones
                beyond = self.without == "the end of the row" and made[places[buffer, row + 1, v]] in self.ones
                if not may or old & self.ones or beyond:
                    return None
            wrong |= {f"{buffer} {'missing' if value in self.ones else 'too old'}" for value in may if value < step}
            if made[place] > step:
                wrong.add(f"{buffer} overwritten")
            if old:
                wrong.add(f"{buffer} too old in L1")
        if self.without == f"cg of {buffer}":  # what the program stores itself is up to date in its cache
            line = {i for (b, _, v), i in places.items() if b == buffer and v not in self.crews[p]}
            cached[p] |= {(i, known[i]) for i in line}
        return wrong


def explore(
    programs,
    warps,
    steps,
    exchanges,
    without="",
    resident=None,
    launches=1,
    counters=None,
    published=False,
    each=True,
    sums=False,
    flagged=0,
):
    """Tries every order of moves. Yields what can come of it, each once, with a shortest way there: "finished",
    "deadlock" or what is wrong with a load, after which the search goes on as if it had been right. Each launch has a
    counter of its own, or they share `counters`. A program that is not among the first `resident` starts when another
    has ended.
    """
    model = Model(
        programs, warps, steps, exchanges, without, resident, launches, counters, published, each, sums, flagged
    )
    first = model.first()
    before, queue, found = {first: None}, deque([first]), set()

    def way(state, w):
        here = [model.line(state, w)]
        return way(*before[state]) + here if before[state] else here

    while queue:  # it ends: every move takes a warp on by a line
        state = queue.popleft()
        moves = [(w, moved) for w in range(len(model.code)) if (moved := model.move(state, w))]
        if not moves:
            end = "finished" if all(model.ended(state[0], p) for p in range(len(model.crews))) else "deadlock"
            if end not in found:
                yield end, way(*before[state]) if before[state] else []
            found.add(end)
        for w, (wrong, after) in moves:
            for what in sorted(wrong - found):
                yield what, way(state, w)
            found |= wrong
            if after not in before:
                before[after] = state, w
                queue.append(after)


RIGHT = [
    # programs, warps, steps, exchanges
    (2, 2, 4, 1),
    (2, 2, 4, 2),
    (3, 1, 4, 1),
    (3, 1, 3, 2),
    (3, 2, 2, 1),
    pytest.param(3, 2, 2, 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("programs", "warps", "steps", "exchanges"), RIGHT)
def test_the_protocol_gives_every_load_its_step_and_ends(programs, warps, steps, exchanges, published, each):
    found = dict(explore(programs, warps, steps, exchanges, published=published, each=each))
    assert found.keys() == {"finished"}, found


TAKEN_AWAY = {
    # what is taken away: what comes of it with one exchange a step, and with two
    "wait": ({"y too old"}, {"y too old", "m too old", "m overwritten"}),
    "arrive": ({"deadlock"}, {"deadlock"}),
    "block before": ({"y too old"}, {"y too old", "m too old", "m overwritten"}),
    "block after": ({"y too old"}, {"y too old", "m too old", "m overwritten"}),
    "release": ({"y too old"}, {"y too old", "m too old"}),
    "acquire": ({"y too old"}, {"y too old", "m too old"}),
    "the last arrival": ({"y too old"}, {"y too old", "m too old", "m overwritten"}),
    "a counter at zero": ({"y too old"}, {"y too old", "m too old", "m overwritten"}),
    "the barrier after y": ({"y too old"}, {"y too old", "m overwritten"}),
    "cg of y": ({"y too old in L1"}, {"y too old in L1"}),
    "cg of m": (set(), {"m too old in L1"}),
    # With two exchanges the barrier in the middle lies between the loads of y and the stores into it.
    "rows of y": ({"y overwritten"}, set()),
}


# Where every warp polls for itself there is no block barrier after it.
@pytest.mark.parametrize(
    ("without", "each"), [(w, each) for w in TAKEN_AWAY for each in (True, False) if not (each and w == "block after")]
)
@pytest.mark.parametrize("exchanges", [1, 2])
@pytest.mark.parametrize("warps", [1, 2])
def test_whatever_is_taken_away_is_missed(without, warps, exchanges, each):
    """All that comes of it, and not only that something does. With one warp a program it happens between programs."""
    found = dict(explore(2, warps, 2, exchanges, without, each=each))
    expected = TAKEN_AWAY[without][exchanges - 1] | (set() if without == "arrive" else {"finished"})
    if without in ("block before", "block after") and warps == 1:
        expected = {"finished"}  # the block barriers are there for the second warp alone
    assert found.keys() == expected, found


PUBLISHED = {
    # likewise, where the first exchange goes through v
    "release": ({"v too old"}, {"v too old", "m too old"}),
    "the barrier before v": ({"v too old", "v overwritten"}, {"v too old", "m overwritten"}),
    "cg of v": ({"v too old in L1"}, {"v too old in L1"}),
    # With two exchanges the second barrier lies between the loads of v and the next stores into it.
    "two of v": ({"v overwritten"}, set()),
}


@pytest.mark.parametrize("exchanges", [1, 2])
@pytest.mark.parametrize("without", PUBLISHED)
def test_whatever_is_taken_away_of_what_is_published_is_missed(without, exchanges):
    found = dict(explore(2, 1, 3, exchanges, without, published=True))
    assert found.keys() == PUBLISHED[without][exchanges - 1] | {"finished"}, found


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("programs", "warps", "steps", "exchanges"), [(2, 2, 3, 1), (2, 1, 4, 2), (3, 1, 3, 1)])
def test_sums_are_read_in_time(programs, warps, steps, exchanges, published):
    found = dict(explore(programs, warps, steps, exchanges, published=published, sums=True))
    assert found.keys() == {"finished"}, found


SUMS = {
    "the wait for s": {"s too old"},
    "cg of s": {"s too old in L1"},
    # The other barrier of a step lies between the loads of s and the next stores into it.
    "the barrier after y": {"y too old", "s overwritten"},
}


@pytest.mark.parametrize("without", SUMS)
def test_whatever_is_taken_away_of_sums_is_missed(without):
    found = dict(explore(2, 1, 3, 1, without, sums=True))
    assert found.keys() == SUMS[without] | {"finished"}, found


@pytest.mark.parametrize("exchanges", [1, 2])
@pytest.mark.parametrize(("programs", "resident"), [(2, 1), (2, 2), (3, 1), (3, 2), (3, 3)])
def test_a_program_that_is_not_resident_keeps_the_others_waiting(programs, resident, exchanges):
    found = dict(explore(programs, 1, 2, exchanges, resident=resident))
    assert found.keys() == {"finished" if resident == programs else "deadlock"}, found


def test_two_launches_at_a_time_need_a_counter_each():
    """With one counter the arrivals of one launch let a program of the other through."""
    found = dict(explore(2, 1, 2, 1, launches=2))
    assert found.keys() == {"finished"}, found
    # Only the first thing found: to go through all there is would be millions of states.
    what, way = next(explore(2, 1, 2, 1, launches=2, counters=1))
    assert what == "y too old"
    assert {int(line[0]) // 2 for line in way if "arrive" in line} == {0, 1}, way


@pytest.mark.parametrize("flagged", [1, 2])
@pytest.mark.parametrize(("programs", "warps", "steps"), [(2, 1, 6), (2, 2, 4), (3, 1, 4), (3, 2, 3), (4, 1, 3)])
def test_values_that_are_their_own_flags_are_read_in_time(programs, warps, steps, flagged):
    """With a start that is all ones, which nobody looks at."""
    found = dict(explore(programs, warps, steps, 1, flagged=flagged))
    assert found.keys() == {"finished"}, found


WITHOUT_A_FENCE = {
    "the fill": {"y too old", "finished"},  # what an earlier launch left
    "the look": {"y missing", "finished"},
    "cg of y": {"deadlock"},
    "rows of y": {"y too old", "y overwritten", "finished"},
    "the end of the row": {"deadlock"},  # a look that takes in the row after it
    "the start as it is": {"deadlock"},
    "the other NaN": {"deadlock"},  # for a result of all ones
}


@pytest.mark.parametrize("flagged", [1, 2])
@pytest.mark.parametrize("warps", [1, 2])
@pytest.mark.parametrize("without", WITHOUT_A_FENCE)
def test_whatever_is_taken_away_of_the_flags_is_missed(without, warps, flagged):
    found = dict(explore(2, warps, 3, 1, without, flagged=flagged))
    assert found.keys() == WITHOUT_A_FENCE[without], found


@pytest.mark.parametrize("without", ["wait", "the last arrival", "a counter at zero", "arrive"])
@pytest.mark.parametrize("warps", [1, 2])
def test_no_read_relies_on_the_counter_that_is_polled_before_the_flags(without, warps):
    """A wrong counter lets programs look too early, which does no harm, or keeps them for ever."""
    found = dict(explore(2, warps, 3, 1, without, flagged=1))
    assert found.keys() == {"deadlock" if without == "arrive" else "finished"}, found


@pytest.mark.parametrize("flagged", [1, 2])
@pytest.mark.parametrize(("programs", "resident"), [(2, 1), (3, 1), (3, 2), (3, 3)])
def test_flags_of_a_program_that_is_not_resident_keep_the_others_waiting(programs, resident, flagged):
    found = dict(explore(programs, 1, 2, 1, resident=resident, flagged=flagged))
    assert found.keys() == {"finished" if resident == programs else "deadlock"}, found


def test_two_launches_whose_values_are_flags_may_even_share_a_counter():
    found = dict(explore(2, 1, 2, 1, launches=2, counters=1, flagged=1))
    assert found.keys() == {"finished"}, found
