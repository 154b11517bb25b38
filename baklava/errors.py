"""The error that a user caused."""


class UserError(ValueError):
    """One sentence for the user: the value, the rule it breaks, and the remedy.

    Scripts print it without a traceback and exit with code 2.
    """
