"""The engine as scripts open it: by the name of a bundle, with packed weights kept for the next time."""

from pathlib import Path

from apps.names import NANO, bundle_named
from runtime import engine
from runtime.errors import EdgeOmniError
from runtime.files import cache_folder
from runtime.reply import Compat
from runtime.session import Options


class Engine(engine.Engine):
    """An open bundle: its graphs, its tokenizer, and what it makes of a file.

    `bundle` is a folder, or "nano" for the model that comes along. `hear`, `look` and `watch` encode audio, pictures
    and videos for a turn. Weights are packed for this processor at the first opening, and kept in the cache folder so
    that later ones are quick, unless `options` say how graphs run (threads, provider, cache). `threads` 0: as many as
    there are cores. EdgeOmniError if it is no bundle, or not whole.
    """

    def __init__(
        self,
        bundle: str | Path = NANO,
        options: Options | None = None,
        compat: Compat = "right",
        *,
        threads: int = 0,
    ):
        super().__init__(bundle_named(bundle), options, compat)
        if options is None:
            self.options = Options(threads, self.manifest.profile, prepack_cache=_kept())


def _kept() -> Path | None:
    """None where there is no place for it: then weights are packed at each opening."""
    try:
        return cache_folder()
    except EdgeOmniError:
        return None
