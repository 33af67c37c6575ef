"""The two ways in which the package says, in Japanese, that the user has to do something."""


class UserError(Exception):
    """A problem that the user can solve; its Japanese text says what, where and what to do next."""

    def _render_traceback_(self):
        # IPython calls this hook: a beginner reads the message alone, without forty lines of library frames.
        return ["", f"⚠️ {self}"]


class TrainingStopped(UserError):
    """The training ended early; `reason` is "nan" or "interrupted"."""

    def __init__(self, text: str, reason: str, step: int):
        super().__init__(text)
        self.reason, self.step = reason, step
