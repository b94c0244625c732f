"""What a rank sends to the coordinator, and how often."""

from moe_core.contract.membership import Member
from moe_runtime.rank.link import Loads
from moe_runtime.registration import RankReport

REPORT = RankReport(member=Member(rank=0, pod_uid="p", address="h:1"), phase="Active", load=((1, 2),))


def test_a_load_goes_out_every_ten_seconds_and_only_when_it_changed() -> None:
    loads, newer = Loads(), REPORT.model_copy(update={"load": ((2, 3),)})
    assert loads.thin(REPORT, 100.0).load == ((1, 2),)
    assert loads.thin(newer, 101.0).load == ()
    assert loads.thin(REPORT, 111.0).load == ()
    assert loads.thin(newer, 112.0) == newer
