"""What ends a run with one clear line instead of a traceback."""


class UserError(Exception):
    """Wrong input: one clear line that names the file, the key and the remedy. The launchers exit with code 2."""


class DivergenceError(Exception):
    """Ranks hold different values of what must be equal; raised on every rank alike. The launchers exit with code 73.

    Training on would mix two models.
    """


class NonFiniteError(Exception):
    """Too many steps in a row could not be made; raised on every rank alike. The launchers exit with code 73."""


class CheckpointError(Exception):
    """A checkpoint could not be written: one clear line, the same on every rank. The launchers exit with code 74.

    The checkpoint before it is whole.
    """


class NoMemoryError(Exception):
    """A rank found no memory: one line that names rank, step and remedy. The launchers exit with code 72."""


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """The run was told to stop and has saved: one line. The launchers exit with code 75."""
