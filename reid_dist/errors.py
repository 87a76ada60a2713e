"""What ends a run with one clear line instead of a traceback."""


class UserError(Exception):
    """Wrong input: one clear line that names the file, the key and the remedy. The launchers exit with code 2."""


class DivergenceError(Exception):
    """Ranks hold different values of what must be equal; raised on every rank alike. The launchers exit with code 1.

    Training on would mix two models.
    """
