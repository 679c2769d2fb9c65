"""NLVR."""


class NlvrSource:
    """Stub until the reader lands."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("not there yet")
