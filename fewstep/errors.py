"""Errors that a user can act on.

Every message names the field or file, the value, what was expected and the remedy, and is raised before
expensive work starts. The command line prints the message alone, without a traceback.
"""


class FewstepError(ValueError):
    """Bad input: a recipe field, a file, a teacher. The message is complete in itself.

    Attributes:
        code: exit code of a command that ends with it.
    """

    code = 2


class RecipeError(FewstepError):
    """A recipe that cannot run; the message starts with the dotted path of the field."""
