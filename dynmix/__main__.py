"""`python -m dynmix`."""

from dynmix.cli import app

app()
