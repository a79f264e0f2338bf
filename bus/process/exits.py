"""How a role's process ends: exit codes that its parent understands, and the errors that lead to them."""

EXIT_OK = 0
EXIT_CRASH = 1
EXIT_CONFIG = 2  # a person must act: the parent reports and ends with this code, it never restarts
EXIT_UNAVAILABLE = 69  # the server cannot be reached: no traceback, the parent tries again
EXIT_NAME_TAKEN = 73  # a living holder elsewhere has the default name: the parent takes the next one
EXIT_SUPERSEDED = 75  # somebody else owns what we held: all is dropped, a new child starts with a new epoch


class StartError(Exception):
    """The role cannot start until a person acts. The message is one line that says what to do."""


class NameTaken(Exception):
    """The name was chosen here, not configured, and a living holder of another folder or machine has it."""


def leaves(error: BaseException) -> list[BaseException]:
    """The errors inside a group, however deep; a plain error is its own leaf."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]
