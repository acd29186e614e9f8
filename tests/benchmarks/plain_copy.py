"""The limit: reads every input once and writes as much as the output once, in blocks, and does nothing else.

    python plain_copy.py OUT PROCESSES INPUT [INPUT ...]        (the output has the size of the first input)

PROCESSES 0: with the safetensors library, which has every tensor of one file in memory at a time, as plain programs do.
Prints the seconds between start and end of the work, Python's own start and imports apart.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time

BLOCK = 1 << 20


def by_library(out: str, inputs: list[str]) -> float:
    from safetensors.torch import load_file, save_file

    start = time.monotonic()
    for path in reversed(inputs):
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, out)
    return time.monotonic() - start


def part(out: str, inputs: list[str], k: int, processes: int) -> None:
    buffer = memoryview(bytearray(BLOCK))
    for path in inputs:
        fd = os.open(path, os.O_RDONLY)
        size = os.fstat(fd).st_size
        at, stop = size * k // processes, size * (k + 1) // processes
        while at < stop:
            at += os.preadv(fd, [buffer[: min(BLOCK, stop - at)]], at)
        os.close(fd)
    size = os.stat(inputs[0]).st_size
    fd = os.open(out, os.O_RDWR | os.O_CREAT)
    at, stop = size * k // processes, size * (k + 1) // processes
    while at < stop:
        at += os.pwrite(fd, buffer[: min(BLOCK, stop - at)], at)
    os.close(fd)


if __name__ == "__main__":
    out, processes, *inputs = sys.argv[1:]
    count = int(processes)
    start = time.monotonic()
    if count == 0:
        start = time.monotonic() - by_library(out, inputs)
    elif count == 1:
        part(out, inputs, 0, 1)
    else:
        workers = [multiprocessing.Process(target=part, args=(out, inputs, k, count)) for k in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    print(f"{time.monotonic() - start:.3f}")
    os.unlink(out)
