"""The content of each tier for one address, for people (`velikiy cache show`)."""

from typing import Any

from velikiy.coherence import CachePath, Gate
from velikiy.coherence.locks import writer_in_flight
from velikiy.coherence.redis_tier import DoesNotAnswer
from velikiy.settings import Settings


def look(gate: Gate, path: CachePath, uri: str, settings: Settings) -> list[dict[str, Any]]:
    """Return one item for PostgreSQL and one for each cache, nearest to the database first, with times in seconds.

    Raises:
        DatabaseUnavailable
    """
    with gate.database.autocommit() as connection:
        writer = writer_in_flight(connection, path)
        redis, *edges = gate.caches.all(connection)
    tiers: list[dict[str, Any]] = [{"tier": "postgres", "writer_in_flight": writer}]
    tiers.append({"tier": "redis", "fenced": redis.fenced, **_in_redis(gate, path, settings.redis_ttl)})
    for edge in edges:
        shown = gate.edge_tier.show(edge, uri)
        tiers.append({"tier": f"edge {edge.address}", "fenced": edge.fenced, **_at_edge(shown)})
    return tiers


def _in_redis(gate: Gate, path: CachePath, ttl: int) -> dict[str, Any]:
    try:
        held = gate.redis_tier.show(path)
    except DoesNotAnswer as error:
        return {"answers": False, "cause": str(error)}
    age = round(ttl - held["ttl"], 1) if held["bytes"] else None
    return {"answers": True, "entries": held["bytes"], "leases": held["leases"], "age": age}


def _at_edge(shown: dict[str, str] | None) -> dict[str, Any]:
    if shown is None:
        return {"answers": False}
    return {
        "answers": True,
        "lease": int(shown["lease"]) / 1000,
        "generation": shown.get("generation"),
        "bytes": int(shown["size"]) if "size" in shown else None,
        "age": int(shown["age"]) if "age" in shown else None,
    }


def text(uri: str, tiers: list[dict[str, Any]]) -> str:
    return "\n".join([uri, *(f"  {tier['tier']:<24} {', '.join(_words(tier))}" for tier in tiers)])


def _words(tier: dict[str, Any]) -> list[str]:
    if tier["tier"] == "postgres":
        return ["a writer is in flight" if tier["writer_in_flight"] else "no writer in flight"]
    words = ["fenced"] if tier["fenced"] else []
    if not tier["answers"]:
        return [*words, tier.get("cause") or "does not answer"]
    if tier["tier"] == "redis":
        words += [f"{size} bytes{f' of {variant}' if variant else ''}" for variant, size in tier["entries"].items()]
        words += [f"fill lease for {variant or 'the path'}" for variant in tier["leases"]]
        return [*words, f"age {tier['age']} s"] if tier["entries"] else words or ["nothing"]
    words.append(f"lease {tier['lease']} s" if tier["lease"] else "no lease: its cache is not used")
    if not tier["generation"]:
        return [*words, "nothing"]
    words.append(f"generation {tier['generation']}")
    return [*words, f"{tier['bytes']} bytes, age {tier['age']} s" if tier["bytes"] else "no entry"]
