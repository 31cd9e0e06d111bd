"""Every error this project raises on purpose, in one tree.

`BadInput` errors are the user's to mend: the command line prints one line and exits with code 2.
The others happen while work is under way: one line and exit code 1. Neither shows a traceback.
"""


class HpcError(Exception):
    """Root of the tree. The message names the value, the rule it broke and what to change."""

    exit_code = 1


class BadInput(HpcError):
    """Something the user gave (flag, file, key, world size) breaks a rule."""

    exit_code = 2


class ConfigError(BadInput):
    """A configuration value is unknown, out of range or contradicts another one."""


class DataError(BadInput):
    """A data file is missing, broken (file and line are named) or leaves a client without examples."""


class ModelError(BadInput):
    """A model is missing, foreign, incomplete, or cannot be cut as asked."""


class TopologyError(BadInput):
    """The number of processes, or the variables they were started with, do not fit the configuration."""


class CheckpointError(BadInput):
    """A checkpoint is missing, broken, or was made with other settings."""


class BudgetSpent(BadInput):
    """The next release would exceed the privacy budget: nothing of it was sent, and checkpoints stay as they are."""


class IdentityError(BadInput):
    """A key is missing, readable by others, unknown, revoked or not the pinned one."""


class HandshakeError(BadInput):
    """The two ends of a link do not agree (version, cut, model); both values are named."""


class LinkError(HpcError):
    """A link broke. The subclasses say how."""


class TamperError(LinkError):
    """A frame was altered, truncated or sealed under another key."""


class ReplayError(LinkError):
    """A frame came again, or out of order."""


class ProtocolError(LinkError):
    """An authentic frame that does not belong here (kind, step, shape or dtype)."""


class NonceExhausted(LinkError):
    """A direction of a link has used up its nonces; a new handshake is needed."""


class PeerLost(LinkError):
    """The peer closed the link, died, or stayed silent past the deadline."""


class NonFinite(HpcError):
    """A loss or gradient is NaN or infinite; names the client and the step."""


class TrunkSuspected(HpcError):
    """The gradients that a trunk returns do not follow from those it was sent; names the step and the figure."""


class Paused(HpcError):
    """Asked to stop, the run wrote a checkpoint and ended; it can go on from there. EX_TEMPFAIL of sysexits.h."""

    exit_code = 75
