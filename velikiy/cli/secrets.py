"""`velikiy secrets`: the passwords and addresses of a stack."""

from pathlib import Path

import click

from velikiy import secret_files


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--postgres", required=True, metavar="HOST:PORT", help="Address of PostgreSQL.")
@click.option("--redis", required=True, metavar="HOST:PORT", help="Address of Redis.")
@click.option(
    "--edge",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the only secret that edges may read: the address of Redis.",
)
def secrets(folder: Path, postgres: str, redis: str, edge: Path | None) -> None:
    """Create the passwords that FOLDER lacks, and the addresses of PostgreSQL and Redis that contain them."""
    secret_files.write(folder, postgres=postgres, redis=redis, edge=edge)
