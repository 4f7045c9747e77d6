"""The errors users see. The command line turns these, and only these, into exit code 2."""


class TvbasesError(Exception):
    """Something the user can mend; the message says which item, how many, a sample, and what to do."""


class CheckpointError(TvbasesError):
    """A checkpoint that is missing, damaged, not a checkpoint, or holds NaN or infinity."""


class MismatchError(TvbasesError):
    """Models that cannot be compared: another architecture, other shapes, another vocabulary."""


class ParameterError(TvbasesError, ValueError):
    """A value outside what a method accepts, or a name that no method knows."""


class OutputError(TvbasesError):
    """An output that cannot be written, or that would overwrite something that is not ours."""


class MissingExtraError(TvbasesError, ImportError):
    """An optional dependency is absent; the message names the extra that brings it."""
