"""An engine that behaves like vLLM without a GPU, and misbehaves on command.

Run as a child process: `PYTHONPATH=loadtests python -m simulator --help`. Tests use it as a real engine; load tests
use it as a load of known speed. It has no batch of real tokens: a step loop (`schedule`) decides when each token is
due, and the text is made of numbered words, so that whoever reads it can tell whether it arrived whole.
"""
