"""What a guard hands to the process of its rank. Both import it, so neither torch nor Ray is imported here."""

from pathlib import Path

from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class RankBoot:
    """Travels as JSON through a child's argument."""

    config_path: str
    token_path: str
    rank: int
    pod_uid: str
    pod_ip: str
    node_name: str
    guard_socket: str
    guard_address: str
    coordinator_url: str
    log_path: str
    ray_address: str
    ray_namespace: str
    ray_temp_dir: str

    @property
    def last_words_path(self) -> Path:
        return Path(f"{self.log_path}.last-words")
