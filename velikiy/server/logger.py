"""gunicorn's logger, without an access log."""

from gunicorn import glogging


class Logger(glogging.Logger):  # type: ignore[misc]  # gunicorn has no types
    """A logger without an access log: the app logs its requests itself, with their ids.

    If `logconfig_dict` is set, gunicorn assumes an access log, and would format a line of each request in vain.
    """

    access_log_enabled = False
