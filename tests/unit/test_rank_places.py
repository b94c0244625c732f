"""Which ranks are near: what runs on one machine, as its pods were told, else what has one address."""

from moe_core.contract.membership import Member, Membership
from moe_runtime.membership.group import EpochGroup
from moe_runtime.rank.traffic import Traffic


def member(rank: int, address: str, node: str = "") -> Member:
    return Member(rank=rank, pod_uid=f"p{rank}", address=address, node=node)


def test_pods_of_one_node_are_near_though_each_has_an_address_of_its_own() -> None:
    one, other, far = member(0, "10.0.0.1:7", "n1"), member(1, "10.0.0.2:7", "n1"), member(2, "10.0.0.3:7", "n2")
    assert one.place == other.place != far.place


def test_without_a_node_the_address_tells() -> None:
    assert member(0, "127.0.0.1:7").place == member(1, "127.0.0.1:8").place
    assert member(0, "[fd00::1]:7").place == member(1, "[fd00::1]:8").place != member(2, "[fd00::2]:7").place


def test_bytes_to_another_pod_of_the_node_stay_on_the_host() -> None:
    members = (member(0, "10.0.0.1:7", "n1"), member(1, "10.0.0.2:7", "n1"), member(2, "10.0.0.3:7", "n2"))
    traffic = Traffic(0)
    traffic.follow(Membership(epoch=1, members=members, map_digest=""), [1, 20, 300])
    assert traffic.by_scope() == {"self": 1, "host": 20, "network": 300}


def test_a_group_knows_the_places_of_its_members() -> None:
    membership = Membership(epoch=1, members=(member(3, "127.0.0.1:7", "n1"),), map_digest="")
    assert EpochGroup.build(membership, rank=3, token="t").domains == ("n1",)
