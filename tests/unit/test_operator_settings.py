"""Settings come from the environment, and a wrong one is named with its value."""

import pytest

from moe_operator.errors import BadSettings
from moe_operator.settings import OperatorSettings


def test_an_empty_environment_gives_defaults_that_hang_together() -> None:
    settings = OperatorSettings.from_environment({})
    assert settings.namespaces == ()
    assert settings.renew_deadline_s + settings.request_timeout_s <= settings.lease_duration_s
    assert settings.retry_s < settings.renew_deadline_s


def test_two_processes_in_one_place_are_told_apart() -> None:
    assert OperatorSettings.from_environment({}).identity != OperatorSettings.from_environment({}).identity


def test_values_are_read() -> None:
    settings = OperatorSettings.from_environment(
        {
            "MOERATOR_NAMESPACES": "a, b,",
            "MOERATOR_HTTP_BIND": "127.0.0.1:9000",
            "MOERATOR_LEADER_ELECTION": "off",
            "MOERATOR_LOG_FORMAT": "json",
        }
    )
    assert settings.namespaces == ("a", "b")
    assert (settings.http_host, settings.http_port) == ("127.0.0.1", 9000)
    assert not settings.leader_election
    assert settings.log_format == "json"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MOERATOR_LEASE_DURATION_S", "soon"),
        ("MOERATOR_LEASE_DURATION_S", "-1"),
        ("MOERATOR_LEASE_DURATION_S", "5"),
        ("MOERATOR_HTTP_BIND", "8080x"),
        ("MOERATOR_HTTP_BIND", "host:99999"),
        ("MOERATOR_LEADER_ELECTION", "yes"),
        ("MOERATOR_LOG_LEVEL", "LOUD"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(BadSettings, match=name):
        OperatorSettings.from_environment({name: value})
