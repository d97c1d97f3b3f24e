"""How much memory this process has, by kind: light, so that asking adds next to nothing to what is asked for."""

from pathlib import Path

from runtime.errors import EdgeOmniError

STATUS = Path("/proc/self/status")  # where Linux counts memory by kind
KINDS = ("RssAnon", "RssFile", "VmHWM")  # its own, that of files, and the most that it had of both


def resident() -> dict[str, int]:
    """Bytes of this process by KINDS. EdgeOmniError where the system does not count them."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError as error:
        raise EdgeOmniError(f"memory by kind is read from {STATUS}, which is not there ({error})") from None
    fields = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(fields[name].split()[0]) for name in KINDS}
