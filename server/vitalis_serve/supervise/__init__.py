"""Keeping child processes alive. Knows nothing of vLLM: what to run and how to ask it are passed in.

lifecycle.py   one replica's states (pure)        replica.py      the task that owns one replica
keeper.py      stands between us and an engine     attendant.py    the task that owns a worker or control
child.py       a process with its channel          supervisor.py   the tree: start, publish, stop in order
output.py      a child's log, bounded              replicas.py     all replicas: scale, drain, restart
orphans.py     what a killed run left behind       journal.py      the desired fleet, on disk
folders.py     paths, lock                         commands.py     the command socket, both ends
"""
