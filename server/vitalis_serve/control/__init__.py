"""The admin plane: the only opener of the store, owner of the snapshot that workers serve from, and the HTTP
API of ops. Its own process (`python -m vitalis_serve.control.process`): when it is away, workers serve on."""
