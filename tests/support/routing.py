"""What a router is fitted on."""


class Encoded(list):
    """Conditions as a router is fitted on them."""

    def __init__(self, cond):
        super().__init__(range(len(cond)))
        self.cond = cond

    def rows(self, index):
        return {name: value[index] for name, value in self.cond.tensors.items()}
