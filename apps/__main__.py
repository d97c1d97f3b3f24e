"""`python -m apps` is the same as `edgeomni`."""

from apps.cli import main

main()
