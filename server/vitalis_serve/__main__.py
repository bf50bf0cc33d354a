"""`python -m vitalis_serve` is `vitalis-serve`."""

from vitalis_serve.cli import main

raise SystemExit(main())
