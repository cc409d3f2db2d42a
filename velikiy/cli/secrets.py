"""`velikiy secrets`: the passwords and addresses of a stack."""

from pathlib import Path

import click

from velikiy import secret_files


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--postgres", required=True, metavar="HOST:PORT", help="Address of PostgreSQL.")
@click.option("--redis", required=True, metavar="HOST:PORT", help="Address of Redis.")
@click.option(
    "--services",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder that gets a folder for each service, with the secrets that this service needs and no others.",
)
@click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="SERVICE=ID",
    callback=lambda context, option, values: dict(map(_group, values)),
    help="Group that may read the folder of a service. This command has to run as a member.",
)
def secrets(folder: Path, postgres: str, redis: str, services: Path | None, groups: dict[str, int]) -> None:
    """Create the passwords that FOLDER lacks, and the addresses of PostgreSQL and Redis that contain them."""
    secret_files.write(folder, postgres=postgres, redis=redis)
    if services:
        secret_files.share(folder, services, secret_files.SERVICES, groups)


def _group(value: str) -> tuple[str, int]:
    service, _, group = value.partition("=")
    if service not in secret_files.SERVICES or not group.isdecimal():
        raise click.BadParameter(f"{value} is not a service ({', '.join(secret_files.SERVICES)}), = and a number")
    return service, int(group)
