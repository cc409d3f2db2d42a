"""FastAPI on uvicorn, with async clients of Redis and PostgreSQL: cache-aside, the key is deleted after COMMIT."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
from fastapi import FastAPI, HTTPException, Response
from psycopg_pool import AsyncConnectionPool
from redis.asyncio import Redis

from bench.peers.user import POOL, SELECT, UPDATE, Changes

TTL = int(os.environ.get("REDIS_TTL", "60"))


def create_app() -> FastAPI:
    cache = Redis.from_url(os.environ["REDIS_URL"])
    database = AsyncConnectionPool(os.environ["DATABASE_URL"], open=False, **POOL)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with database, cache:
            yield

    app = FastAPI(lifespan=lifespan)

    # The handlers return bytes: a response model would parse and serialise them once more.
    @app.get("/users/{user_id}")
    async def get_user(user_id: int) -> Response:
        key = f"user:{user_id}"
        body = await cache.get(key)
        if body is None:
            async with database.connection() as connection:
                row = await (await connection.execute(SELECT, (user_id,))).fetchone()
            if row is None:
                raise HTTPException(404)
            body = orjson.dumps(row)
            await cache.setex(key, TTL, body)
        return Response(body, media_type="application/json")

    @app.put("/users/{user_id}")
    async def update_user(user_id: int, changes: Changes) -> Response:
        async with database.connection() as connection:
            row = await (await connection.execute(UPDATE, (changes.name, changes.email, user_id))).fetchone()
        if row is None:
            raise HTTPException(404)
        await cache.delete(f"user:{user_id}")
        return Response(b'{"message":"Updated"}', media_type="application/json")

    return app
