"""Tenants, keys and the audit table on disk. Only the control process opens it; workers serve from snapshots.

`database.py` opens and migrates, `tables.py` is the schema of this version of the program, `records.py` reads
and changes rows, `secrets.py` makes keys. Every time is UTC in whole Unix seconds.
"""
