"""Errors of the data plane.

RuntimeFault
├── GroupFault      a collective failed or ran past its deadline: a peer died, hangs or is cut off
├── MinorityStop    too few living members to decide the next epoch, and nobody vouches for the others' death
└── Fenced          the others have decided an epoch without this rank: it may do nothing but ask to rejoin
"""


class RuntimeFault(RuntimeError):
    """Root of the faults that the step loop knows how to handle."""


class GroupFault(RuntimeFault):
    """A collective of this epoch cannot finish; the step must be rolled back and the membership agreed anew."""


class MinorityStop(RuntimeFault):
    """This side holds no quorum of its epoch and must not serve on its own."""


class Fenced(RuntimeFault):
    """A decided epoch excludes this rank; its state is stale and nothing of it may be served."""
