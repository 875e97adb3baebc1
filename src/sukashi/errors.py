"""Errors a user can cause: one sentence each (value, rule, remedy), and the exit code the command line gives them."""


class SukashiError(ValueError):
    """A case that cannot be done right; the message names the value, the rule and the remedy."""

    exit_code = 1


class UsageError(SukashiError):
    """A wrong argument, option or configuration."""

    exit_code = 2


class DataError(SukashiError):
    """Images, labels or splits that break a rule."""

    exit_code = 3


class ModelError(SukashiError):
    """A model, its weights or its recipe that breaks a rule."""

    exit_code = 4


class ResourceError(SukashiError):
    """No memory, no disk, or a folder another process holds."""

    exit_code = 5
