"""Why the operator ends or does not start.

MoeratorError (moe_core.outcome)
├── ClusterError         a verb did not take effect: cluster/protocol.py
└── OperatorError        the process cannot do its work
    ├── BadSettings      an environment variable is wrong; the text names it and its value
    └── NoCluster        no kubeconfig and no service account, or the custom resources are not installed
"""

import logging
import os
from typing import NoReturn

from moe_core.outcome import MoeratorError

logger = logging.getLogger(__name__)

EXIT_LEASE_LOST = 70
EXIT_BROKEN = 71


class OperatorError(MoeratorError):
    """The operator cannot do its work."""


class BadSettings(OperatorError):
    """A setting is outside its domain."""


class NoCluster(OperatorError):
    """There is no API server to talk to, or it does not serve our resources."""


def end_process(code: int, why: str) -> NoReturn:
    """End at once, without unwinding.

    Nothing is lost: a new process recomputes everything from what it observes, while an orderly stop of one that lost
    its Lease would leave it time to act.
    """
    logger.critical("%s; ending with code %d", why, code)
    logging.shutdown()
    os._exit(code)
