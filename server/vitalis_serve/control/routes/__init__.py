"""Control's routes, a file for each subject: a function that takes the `Control` and returns a router. Routes decide
nothing: changes go through `changes.py`, fleet commands to the supervisor."""
