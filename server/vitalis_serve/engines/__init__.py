"""What to run: argv and environment of an engine, its GPUs, memory plan, probes, model files. Nothing here imports
vLLM or torch: an engine is a process in its own virtual environment."""
