"""Whatever a network may do to messages, and whoever crashes, no two values are ever decided; and a living quorum
decides."""

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.contract.membership import Member, Membership
from moe_runtime.membership.agreement import Acceptor, Ballot, Promise, Proposal

Quorum = Callable[[frozenset[int]], bool]


def membership(size: int) -> Membership:
    members = tuple(Member(rank=r, pod_uid=f"p{r}", address=f"h:{r}") for r in range(size))
    return Membership(epoch=1, members=members, map_digest="")


@dataclass
class World:
    """Acceptors, running proposals and the messages under way between them."""

    size: int
    is_quorum: Quorum
    acceptors: list[Acceptor[str]] = field(init=False)
    proposals: list[Proposal[str]] = field(default_factory=list)
    messages: list[Callable[[], None]] = field(default_factory=list)
    arrived: list[Callable[[], None]] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)
    decided: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.acceptors = [Acceptor() for _ in range(self.size)]

    def start(self, rank: int) -> None:
        """A new attempt, higher than any before, with a value of its own."""
        if rank in self.dead:
            return
        proposal = Proposal(
            Ballot(len(self.proposals) + 1, rank), f"value of attempt {len(self.proposals) + 1}", self.is_quorum
        )
        self.proposals.append(proposal)
        for to in range(self.size):
            self.messages.append(lambda to=to: self._prepare(proposal, to))  # type: ignore[misc]

    def deliver(self, index: int) -> None:
        """One of the oldest messages under way arrives; it may come again later."""
        if self.messages:
            message = self.messages.pop(index % min(8, len(self.messages)))
            self.arrived.append(message)
            message()

    def repeat(self, index: int) -> None:
        if self.arrived:
            self.arrived[index % len(self.arrived)]()

    def lose(self, index: int) -> None:
        if self.messages:
            self.messages.pop(index % len(self.messages))

    def deliver_all(self) -> None:
        while self.messages:
            self.deliver(0)

    def _prepare(self, proposal: Proposal[str], to: int) -> None:
        if to in self.dead:
            return
        answer = self.acceptors[to].prepare(proposal.ballot)
        if isinstance(answer, Promise):
            self.messages.append(lambda: self._promised(proposal, to, answer))

    def _promised(self, proposal: Proposal[str], sender: int, promise: Promise[str]) -> None:
        if proposal.ballot.rank in self.dead:
            return
        was_promised = proposal.is_promised
        proposal.on_promise(sender, promise)
        if proposal.is_promised and not was_promised:
            value = proposal.value
            for to in range(self.size):
                self.messages.append(lambda to=to: self._accept(proposal, to, value))  # type: ignore[misc]

    def _accept(self, proposal: Proposal[str], to: int, value: str) -> None:
        if to in self.dead:
            return
        if self.acceptors[to].accept(proposal.ballot, value) is None:
            self.messages.append(lambda: self._accepted(proposal, to))

    def _accepted(self, proposal: Proposal[str], sender: int) -> None:
        # A decision counts even if its proposer is dead by now: nobody may ever decide otherwise.
        proposal.on_accepted(sender, proposal.ballot)
        if proposal.is_decided:
            self.decided.add(proposal.value)


Moves = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.integers(0, 5)),
        *[st.tuples(st.just("deliver"), st.integers(0, 7))] * 9,
        st.tuples(st.just("repeat"), st.integers(0, 1000)),
        st.tuples(st.just("lose"), st.integers(0, 1000)),
        st.tuples(st.just("crash"), st.integers(0, 5)),
    ),
    min_size=60,
    max_size=250,
)


def play(world: World, moves: list[tuple[str, int]], *, crashes: int) -> None:
    for move, number in moves:
        if move == "crash":
            if len(world.dead) < crashes:
                world.dead.add(number % world.size)
        elif move == "start":
            world.start(number % world.size)
        else:
            getattr(world, move)(number)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 6), moves=Moves)
def test_never_two_values_are_decided(size: int, moves: list[tuple[str, int]]) -> None:
    world = World(size, membership(size).is_quorum)
    world.start(0)
    play(world, moves, crashes=size)
    assert len(world.decided) <= 1


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 6), moves=Moves)
def test_a_living_quorum_decides_once_its_messages_arrive_and_keeps_what_was_decided(
    size: int, moves: list[tuple[str, int]]
) -> None:
    world = World(size, membership(size).is_quorum)
    world.start(0)
    play(world, moves, crashes=(size - 1) // 2)
    before = set(world.decided)
    living = min(set(range(size)) - world.dead)
    world.messages.clear()
    world.start(living)
    world.deliver_all()
    assert len(world.decided) == 1
    assert before <= world.decided


@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 6), moves=Moves, data=st.data())
def test_the_living_left_after_a_vouching_never_decide_against_a_quorum_that_one_of_them_was_in(
    size: int, moves: list[tuple[str, int]], data: st.DataObject
) -> None:
    base = membership(size)
    gone = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    everybody_else = frozenset(range(size)) - gone
    # The vouched rule of the ledger: a quorum, or all who are not vouched dead.
    before = World(size, base.is_quorum)
    before.start(0)
    play(before, moves, crashes=0)
    decided_by_living = {p.value for p in before.proposals if p.is_decided and p._accepted_by & everybody_else}
    after = World(size, lambda ranks: base.is_quorum(ranks) or everybody_else <= ranks)
    after.acceptors, after.proposals, after.dead = before.acceptors, before.proposals, set(gone)
    after.start(min(everybody_else))
    after.deliver_all()
    assert len(after.decided) == 1
    assert decided_by_living <= after.decided
