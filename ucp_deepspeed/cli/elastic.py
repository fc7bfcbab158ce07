"""``ucp run`` and ``ucp store``."""

from __future__ import annotations

import socket

import click

from ucp_deepspeed.elastic import launch, store

run = launch.run


def hold(port: int) -> None:
    """Do what ``ucp store`` says."""

    def tell(port: int) -> None:
        click.echo(f"listening on port {port}; next: ucp run --store {socket.getfqdn()}:{port} … on each node")

    store.serve(port, alone=False, ready=tell)
