"""What the user can fix, as one kind of error; nothing here takes time to import."""


class UserError(Exception):
    """Something the user can fix; the message is one line that says what is wrong and how to fix it."""
