"""`python -m sid_trainer` is the `sid` command."""

from .cli import main

raise SystemExit(main())
