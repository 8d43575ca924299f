"""The two ways in which a command can end badly, with their exit codes."""


class UserError(ValueError):
    """Wrong usage, configuration or input: found before anything expensive, exit code 2."""

    exit_code = 2


class StageError(RuntimeError):
    """Something that only running could tell (a failed stage, a broken expectation): exit code 1."""

    exit_code = 1
