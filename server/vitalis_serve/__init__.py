"""vitalis-serve: vLLM engines kept alive behind one authenticated gateway.

cli/          argv -> command                       main.py     settings -> processes (composition root)
settings/     schema of config/, loading, merging   errors.py   every error a client can be answered with
fleet.py      replicas as everyone sees them        metrics.py  every metric, in one list
logs.py       JSON lines                            store/      tables, migrations
supervise/    keeping child processes alive         engines/    what to run: argv, placement, probes, models
gateway/      the data plane                        control/    the admin plane
"""

__version__ = "0.2.0"
