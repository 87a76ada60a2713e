"""The one exception for wrong input."""


class UserError(Exception):
    """Wrong input: one clear line that names the file, the key and the remedy. The launchers exit with code 2."""
