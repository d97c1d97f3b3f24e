"""How a bundle is named, wherever one is: by its folder, or as `nano`, which comes along."""

from contextlib import suppress
from pathlib import Path

from runtime.errors import EdgeOmniError
from runtime.files import exists

NANO = "nano"


def bundle_named(name: str | Path) -> Path:
    """The folder of the bundle that a person names: `nano`, unless a bundle of that name lies here, or a path.

    The path need not be one of a bundle; whoever opens it says so. EdgeOmniError if the embedded bundle cannot be made.
    """
    path = Path(name)
    if name == NANO and not is_bundle(path):
        from apps.embedded import embedded_bundle

        return embedded_bundle()
    if isinstance(name, str) and name.startswith("~") and not exists(path):
        with suppress(RuntimeError):  # ~ of somebody whom this machine does not know
            return path.expanduser()
    return path


def with_bundle(*given: str | None, wanted: str) -> list[str]:
    """The arguments of a command that takes a bundle first: behind `nano` where only the others were given.

    EdgeOmniError, with what is `wanted` besides the bundle, where there are fewer.
    """
    words = [word for word in given if word is not None]
    names_bundle = bool(words) and (words[0] == NANO or is_bundle(Path(words[0])))
    if len(words) + (not names_bundle) < len(given):
        raise EdgeOmniError(f"an argument is missing; give {wanted}, behind a bundle unless nano is meant")
    return words if len(words) == len(given) else [NANO, *words]


def is_bundle(folder: Path) -> bool:
    from runtime import bundle  # late: what it is built on takes longer to import than `--help` may take

    return bundle.is_bundle(folder)
