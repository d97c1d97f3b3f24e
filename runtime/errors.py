"""The one kind of error that a user's mistake raises; the command line prints its message without a traceback."""


class EdgeOmniError(Exception):
    """Says what was found, what was expected and what to do."""


class BundleError(EdgeOmniError):
    """A bundle is missing, incomplete, altered or of another version."""


class CheckpointError(EdgeOmniError):
    """A checkpoint is missing, truncated, contradictory or of an unknown family."""


class MediaError(EdgeOmniError):
    """An audio, image or video input cannot be used."""


class PromptError(EdgeOmniError):
    """A prompt is empty, malformed or too long for the context."""
