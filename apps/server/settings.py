"""What a server is told at its start, and the limits of what clients may send."""

import ipaddress
import socket
from dataclasses import dataclass, field

from runtime.errors import EdgeOmniError

MEBI = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Of one request, unless said."""

    body: int = 48 * MEBI  # bytes
    body_seconds: float = 60.0  # for a client to send it
    stall_seconds: float = 30.0  # for a client to take what was sent to it
    messages: int = 2_000
    pictures: int = 16
    pixels: int = 40_000_000  # of a picture
    audios: int = 32
    speech_characters: int = 4_096  # of a text that is read aloud
    kept_bytes: int = 512 * MEBI  # of contexts of conversations that may go on
    buffer_seconds: float = 300.0  # of audio in a realtime conversation that was not committed
    idle_seconds: float = 900.0  # for a realtime client to say something
    remembered: int = 256  # spoken answers, of all clients
    remembered_seconds: float = 3_600.0  # since they were given
    characters: int = 2_000_000  # of all text together
    open_requests: int = 128  # at once, those that wait for their body included


@dataclass(frozen=True)
class ServerSettings:
    """Where to listen and whom to serve. `sessions`: replies that are made at once; beyond it clients are told to wait.

    EdgeOmniError where it would be open to a network without a token.
    """

    name: str  # of the model
    host: str = "127.0.0.1"
    port: int = 8080
    token: str | None = field(default=None, repr=False)
    sessions: int = 8
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise EdgeOmniError(
                "the token is empty or holds characters that no HTTP header can; use letters and digits"
            )
        if self.token is None and not is_loopback(self.host):
            raise EdgeOmniError(
                f"{self.host} can be reached from other machines, so clients must show a token: add --token T (or set "
                "EDGEOMNI_TOKEN), or listen on 127.0.0.1"
            )

    @property
    def names(self) -> frozenset[str]:
        """Names of this machine that a Host header may hold beside addresses, in lower case."""
        here = socket.gethostname().lower()
        return frozenset({"localhost", self.host.lower(), here, f"{here}.local"})


def is_loopback(host: str) -> bool:
    """Whether a host, as it is listened on, can be reached from this machine alone."""
    return host.lower() == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_address(host: str) -> bool:
    """Whether it is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
