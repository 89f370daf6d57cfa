"""Other people's matrix products as worker processes of `nibble bench gemm --peers`.

A worker answers one JSON object per line of its standard input with one per line of its standard
output (docs/peers.md). `worker` owns that; every other module is one library, loaded only here, so
that nothing of it reaches the tool. Only `run` is timed, by the worker's own clock.
"""
