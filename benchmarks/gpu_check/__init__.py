"""The first minutes on a GPU: does the suite run there, does it compute what it computes on a CPU, and how fast?

    make gpu-bundle     here: what a bare machine lacks, in pieces of 56 MiB at most, in dist/gpu-bundle
    make gpu-check      there: stages in order of worth, each with its own process, time limit and JSON

`python3 -m gpu_check --help`, with `benchmarks` on the PYTHONPATH, is the same without make.
"""
