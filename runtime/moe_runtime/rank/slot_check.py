"""Whether what lies in all ranks' slots is what should: asked before a new map is taken up, and in each new epoch.

Every rank says the digest of each of its slots. Copies of one expert must agree, with each other and with what was
agreed on when the expert was first in force, wherever it lay then. Before a change the old slots are still there, so a
mismatch drops the staged ones on all ranks and they are read again; in force, the rank that holds the wrong bytes ends,
which frees nobody but itself: the others go on and its replacement reads anew.
"""

from collections.abc import Mapping

from moe_runtime.engine.model import ExpertParallelModel, StagedSlots
from moe_runtime.experts.digest import Expert, as_row, copies_of, named, wrong_copies
from moe_runtime.membership.group import EpochGroup

_READ_MS = 60_000
"""For exchanges after slots or disputed experts were read; a peer that dies meanwhile is seen at once, one that stops
is ended by its guard."""


class SlotsCorrupt(RuntimeError):
    """This rank holds an expert that is not what it should be; it must not answer with it."""


class SlotCheck:
    """One rank's side; all members call the same method at the same boundary. `mismatches`: wrong copies it saw."""

    def __init__(self) -> None:
        self.mismatches = 0
        self._known: dict[Expert, int] = {}

    def staged(self, group: EpochGroup, epm: ExpertParallelModel, staged: StagedSlots | None) -> str:
        """Why the staged slots may not come into force; nothing when they may. `staged` None: this rank is to leave.

        Raises SlotsCorrupt when what was copied from is what is damaged: this rank is to end.
        """
        new_map = staged.expert_map if staged is not None else epm.expert_map
        row = as_row(staged.digests, new_map) if staged is not None else ()
        width = max(w for (w,) in group.all_gather_ints((len(row),)))
        rows = group.all_gather_ints((*row, *(0,) * (width - len(row))))
        wrong: dict[Expert, tuple[int, ...]] = {}
        if staged is not None:
            staying = [position for position, rank in enumerate(group.ranks) if any(rows[position])]
            ranks = [group.ranks[position] for position in staying]
            wrong = wrong_copies(copies_of([rows[p] for p in staying], ranks, new_map), self._known)
        if not any(seen for (seen,) in group.all_gather_ints((len(wrong),))):
            return ""
        self._count(group, wrong)
        rank = group.ranks[group.position]
        mine = [e for e, ranks in wrong.items() if rank in ranks and e in self._known and epm.holds(*e)]
        epm.slot_digests(fresh=True)
        if damaged := [expert for expert in mine if epm.slot_digest(*expert) != self._known[expert]]:
            raise SlotsCorrupt(f"{named(damaged)}: memory is not what it was")
        return f"staged slots are not what they should be: {named(wrong) or 'as other ranks see it'}"

    def placed(self, group: EpochGroup, epm: ExpertParallelModel) -> None:
        """Raises SlotsCorrupt when this rank is to end. GroupFault as any exchange."""
        mine = as_row(epm.slot_digests(), epm.expert_map)
        rows = group.all_gather_ints(mine, timeout_ms=_READ_MS)
        copies = copies_of(rows, group.ranks, epm.expert_map)
        if any(seen for (seen,) in group.all_gather_ints((len(wrong_copies(copies, self._known)),))):
            self._known = self._of_all(group, epm)
            wrong = wrong_copies(copies, self._known)
            self._count(group, wrong)
            self._judge(group, epm, wrong)
        for expert, digest_of_rank in copies.items():
            self._known.setdefault(expert, digest_of_rank[min(digest_of_rank)])

    def _of_all(self, group: EpochGroup, epm: ExpertParallelModel) -> dict[Expert, int]:
        """What the first rank knows that knows anything: a rank that has just come knows nothing."""
        experts = [(layer_idx, e) for layer_idx in range(epm.num_layers) for e in range(epm.num_experts)]
        rows = group.all_gather_ints(tuple(self._known.get(expert, 0) for expert in experts))
        row = next((row for row in rows if any(row)), rows[0])
        return {expert: digest for expert, digest in zip(experts, row, strict=True) if digest}

    def _judge(self, group: EpochGroup, epm: ExpertParallelModel, wrong: Mapping[Expert, tuple[int, ...]]) -> None:
        """Who ends: whose memory is not what it reads now from its source; if nobody's, whose copies were outvoted."""
        rank = group.ranks[group.position]
        held = [expert for expert in wrong if epm.holds(*expert)]
        damaged = [expert for expert in held if epm.slot_digest(*expert) != epm.source_digest(*expert)]
        anybody = any(count for (count,) in group.all_gather_ints((len(damaged),), timeout_ms=_READ_MS))
        mine = damaged if anybody else [expert for expert, ranks in wrong.items() if rank in ranks]
        if mine:
            raise SlotsCorrupt(f"{named(mine)}: " + ("memory is not what its source says" if anybody else "outvoted"))

    def _count(self, group: EpochGroup, wrong: Mapping[Expert, tuple[int, ...]]) -> None:
        """Once for all: by the first rank that will live to tell."""
        guilty = {rank for ranks in wrong.values() for rank in ranks}
        witness = next((rank for rank in group.ranks if rank not in guilty), group.ranks[0])
        if group.ranks[group.position] == witness:
            self.mismatches += sum(map(len, wrong.values()))
