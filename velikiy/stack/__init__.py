"""Running the whole stack without Docker: PostgreSQL, Redis, apps and edges as unprivileged processes of their
own, on their own ports, under supervisor. `./run` is the door to it."""


class Refusal(Exception):
    """Why something is not done, in a sentence that says what to do next; nothing was changed."""
