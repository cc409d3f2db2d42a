"""The settings that a running stack has, as its scripts say."""

import shlex

from velikiy.findings import Finding, configuration
from velikiy.settings import BadSetting, ServiceSettings, StackSettings, load
from velikiy.stack import consoles, options
from velikiy.stack.plan import Plan
from velikiy.stack.programs import script

OF_THE_LAUNCHER = ("APP_FIRST_CPU", "REDIS_DIRECT", "BIND")
"""The launcher chooses the value for each process."""


def running_settings(plan: Plan) -> dict[str, str]:
    """Return the settings that the apps run with: the variables in the script of the first app."""
    words = _words(plan)
    names = {name.upper() for name in ServiceSettings.model_fields}
    return {
        name: value
        for name, equals, value in (word.partition("=") for word in words)
        if equals and name in names and name not in OF_THE_LAUNCHER
    }


def _words(plan: Plan) -> list[str]:
    """Return the words of the command of the first app."""
    try:
        return shlex.split(script(plan, "app1").read_text().splitlines()[2])
    except (OSError, IndexError, ValueError):
        return []


def code(plan: Plan) -> str:
    """Return the folder of the code that runs."""
    return next((word.partition("=")[2] for word in _words(plan) if word.startswith("PYTHONPATH=")), "")


def changed_settings(plan: Plan) -> dict[str, str]:
    """Return the settings of the running stack that differ from their defaults, without secrets."""
    changed = {
        name: value
        for name, value in running_settings(plan).items()
        if value != str(ServiceSettings.model_fields[name.lower()].default)
    }
    of_the_plan = {
        "BIND": (plan.bind, "127.0.0.1"),
        "EDGES": (plan.edges, 1),
        "APPS": (plan.apps, 2),
        "REDIS_MEMORY": (plan.redis_memory, 256),
    }
    changed.update({name: str(value) for name, (value, default) in of_the_plan.items() if value != default})
    for name, is_own in (("database_url", plan.own_postgres), ("redis_url", plan.own_redis)):
        if not is_own:
            changed[name.upper()] = consoles.masked(plan.secret(name))
    return dict(sorted(changed.items()))


def default(name: str) -> str:
    """Return the default of a setting, for people."""
    field = ServiceSettings.model_fields.get(name.lower()) or StackSettings.model_fields[name.lower()]
    return "not set" if field.default is None else str(field.default)


OF_THE_PLAN = ("apps", "bind", "edges", "log_file_size", "log_files", "metrics_port", "port", "redis_memory")
"""The settings of `./run up` that the plan of a stack has under the same names."""


def unapplied(plan: Plan) -> list[Finding]:
    """Return the settings of `.env` and of the environment that the running stack does not have yet, or that it would
    refuse."""
    try:
        wanted, of_the_stack = load(ServiceSettings, None), load(StackSettings, None)
    except BadSetting:
        advice = "The stack goes on with its settings, and the next start will be refused. Correct it in .env."
        bad = configuration.all_refused([ServiceSettings, StackSettings])
        return [it._replace(advice=advice, wrong=False) for it in bad]
    running = running_settings(plan)
    differing = {
        name: (getattr(wanted, name), running.get(name.upper()))
        for name in wanted.model_fields_set
        if running and name.upper() not in OF_THE_LAUNCHER
        if str(getattr(wanted, name)) != running.get(name.upper())
    }
    remembered = options.remember({}, of_the_stack, plan, forget=False)
    differing |= {
        name: (getattr(of_the_stack, name), str(getattr(plan, name)))
        for name in OF_THE_PLAN
        if name in of_the_stack.model_fields_set and name not in remembered
        if getattr(of_the_stack, name) != getattr(plan, name)
    }
    return [configuration.unapplied(name.upper(), str(new), old) for name, (new, old) in sorted(differing.items())]
