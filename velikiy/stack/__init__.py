"""Run the whole stack without Docker.

PostgreSQL, Redis, the apps and the edges run as unprivileged processes on ports of their own, under supervisor.
`./run` starts this package.
"""


class Refusal(Exception):
    """The reason why a command does nothing, in a sentence that says what to do next. Nothing was changed."""
