"""What the user can fix, as one kind of error; nothing here takes time to import."""


class UserError(Exception):
    """Something the user can fix; the message is one line that says what is wrong and how to fix it.

    own: of several processes of a run only this one has the error, as when its memory is full; otherwise all have it.
    """

    def __init__(self, message: str, own: bool = False) -> None:
        super().__init__(message)
        self.own = own
