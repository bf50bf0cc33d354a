"""Records of what requests used, on local disk from the moment an engine gets one until the store has it.

`record.py` is the format, `files.py` the folder, `writer.py` the worker's side, `reader.py` and `spent.py` control's
(and, for the sums of the day and month at its start, the worker's that owns limits).
"""
