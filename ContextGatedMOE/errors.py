"""The one error of this package."""


class MixtureError(ValueError):
    """An adapter, a folder or a request that cannot become an exact mixture; the message is one sentence."""
