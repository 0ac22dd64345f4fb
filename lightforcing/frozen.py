"""Values that nobody changes, for the two classes that ``import lightforcing`` always needs.

``dataclasses`` would write them while they load: that and the modules behind it took 3 of 6 ms
beyond NumPy 2.4, and 12 of 15 where NumPy has not loaded ``inspect`` already, as 2.1 has not.
"""


class Frozen:
    """A value whose attributes are given once, by ``super().__init__``."""

    def __init__(self, **values):
        """Its attributes, by name."""
        for name, value in values.items():  # not vars(self): torch.compile cannot trace that
            object.__setattr__(self, name, value)

    def __setattr__(self, name, value):
        """No."""
        raise AttributeError(f"{name}: expected a new {type(self).__name__}, this one is fixed")

    def __delattr__(self, name):
        """No."""
        raise AttributeError(f"{name}: expected to stay, a {type(self).__name__} is fixed")

    def __repr__(self):
        """The call that makes it."""
        values = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({values})"
