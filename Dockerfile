# The app. The file uses only syntax that the legacy builder knows, because Debian 12 packages that builder.
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE} AS app

# The code is compiled once, below: at run time the file system is read-only.
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    APP_LISTEN=0.0.0.0:5000

# A numeric user, so that Kubernetes can verify that it is not root. This user owns these folders because a new
# volume takes over the owner of the folder that it is mounted on, and `velikiy secrets` writes into such volumes.
RUN groupadd --gid 10001 velikiy \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /app --shell /usr/sbin/nologin velikiy \
    && install -d -o velikiy -g velikiy -m 0700 /backups /run/secrets /run/services \
        /run/services/app /run/services/migrate /run/services/postgres /run/services/redis /run/services/edge

WORKDIR /app

# Packages come before the code, which changes more often: so Docker reuses the layer with the packages.
COPY requirements.txt ./
RUN pip install --no-cache-dir --require-hashes -r requirements.txt

COPY velikiy/ velikiy/
COPY migrations/ migrations/
RUN python -m compileall -q velikiy migrations

USER 10001:10001
EXPOSE 5000
CMD ["gunicorn", "-c", "velikiy/server/gunicorn.conf.py", "velikiy:create_app()"]

# The app with pg_dump and pg_restore, which need 160 MB with their packages: the service `backup` of compose.yaml, or
# `docker build --target backup`.
FROM app AS backup
USER 0:0
# No version: Debian keeps only the newest build of a stable release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends postgresql-client \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001

# A build without a target makes the app.
FROM app
