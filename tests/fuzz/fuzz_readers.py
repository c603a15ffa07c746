"""Damaged files for every reader: each is read right or refused in one line; nothing else may happen.

    python tests/fuzz/fuzz_readers.py --n 100000 --kind star cs mrc pickle txt

Inputs are mutated from seeds that are made here, by knowledge of the formats and not by coverage (atheris): headers,
columns and words are where the readers branch, and a plain Python process can do it.
An input follows from the seed, its kind and its number; those that a reader takes badly are kept, with the traceback.
"""

import argparse
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.inputs import KINDS, attempt, make_companions, make_input

SECONDS = 2.0
MEGABYTES = 512
_CHUNK = 500


class OverTimeError(BaseException):
    """An input took too long; no reader may catch this."""


@dataclass
class Tally:
    """What became of the inputs of each kind, and what was found."""

    read: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest_in_seconds: float = 0.0

    def add(self, other):
        self.read.update(other.read)
        self.refused.update(other.refused)
        self.findings += other.findings
        self.slowest_in_seconds = max(self.slowest_in_seconds, other.slowest_in_seconds)


def scratch_folder():
    """Where inputs are written: in memory, where the system offers that."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


@contextmanager
def limited(seconds=SECONDS, megabytes=MEGABYTES):
    """Within: a limit of address space beyond what is in use, and an end to what takes too long."""

    def stop(_signal, _frame):
        raise OverTimeError(f"more than {seconds} s of computing, or {10 * seconds} s of waiting")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space_in_bytes() + megabytes * 2**20, hard))
    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space_in_bytes():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def read_one(kind, path, seconds=SECONDS):
    """Read a file in all ways; returns in how many, and what was found, which is None if all is well."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return attempt(kind, path), None
    except (Exception, OverTimeError):
        return 0, traceback.format_exc()
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)


def run(jobs, seed, keep=None, on_start=lambda _job: None, seconds=SECONDS, scratch=None):
    """Read the inputs ``jobs``, pairs of kind and number, in this process."""
    tally = Tally()
    with tempfile.TemporaryDirectory(dir=scratch or scratch_folder(), prefix="cryoai-fuzz-") as name, limited(seconds):
        folder = Path(name)
        make_companions(folder)
        for job in jobs:
            on_start(job)
            made = make_input(job[0], seed, job[1])
            path = folder / f"input{made.suffix}"
            path.write_bytes(made.content)
            started = time.process_time()
            n_read, finding = read_one(made.kind, path, seconds)
            tally.slowest_in_seconds = max(tally.slowest_in_seconds, time.process_time() - started)
            if finding is not None:
                tally.findings.append(_kept(keep, made, finding))
            (tally.read if n_read else tally.refused)[made.kind] += 1
            path.unlink()
    return tally


def _kept(keep, made, finding):
    """One line about a finding, which is written down with its input."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        stem = keep / f"{made.kind}-{made.number}"
        stem.with_suffix(made.suffix).write_bytes(made.content)
        stem.with_suffix(".finding").write_text(finding, errors="backslashreplace")
    return f"{made.kind} {made.number}: {finding.strip().splitlines()[-1][:300]}"


# ------------------------------------------------------------------------------ many, in processes of their own


def run_isolated(jobs, seed, keep):
    """As :func:`run`, in another process, so that an input that ends the process is found too."""
    tally = Tally()
    context = multiprocessing.get_context("fork")
    while jobs:
        receiver, sender = context.Pipe(duplex=False)
        place = context.Value("q", -1)
        with tempfile.TemporaryDirectory(dir=scratch_folder(), prefix="cryoai-fuzz-") as scratch:
            child = context.Process(target=_work, args=(jobs, seed, keep, sender, place, scratch))
            child.start()
            sender.close()
            try:
                part = receiver.recv()
            except EOFError:  # the process has ended before it could tell
                part = None
            child.join()
        if part is not None:
            tally.add(part)
            jobs = []
        else:
            made = make_input(jobs[place.value][0], seed, jobs[place.value][1])
            tally.findings.append(_kept(keep, made, f"the process ended with status {child.exitcode}"))
            tally.add(run_isolated(jobs[: place.value], seed, keep))
            jobs = jobs[place.value + 1 :]
    return tally


def _work(jobs, seed, keep, sender, place, scratch):
    def on_start(_job):
        place.value += 1

    sender.send(run(jobs, seed, keep, on_start, scratch=scratch))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so long")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", type=int, help="the number of one input, with one --kind: read it alone")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "cryoai-fuzz-findings")
    arguments = parser.parse_args()
    started = time.monotonic()
    numbers = range(arguments.n) if arguments.only is None else [arguments.only * len(arguments.kind)]
    jobs = [(arguments.kind[i % len(arguments.kind)], i // len(arguments.kind)) for i in numbers]
    tally = Tally()
    for start in range(0, len(jobs), _CHUNK):
        if time.monotonic() - started > 60 * arguments.minutes:
            break
        part = run_isolated(jobs[start : start + _CHUNK], arguments.seed, arguments.keep)
        for line in part.findings:
            print(line, flush=True)
        tally.add(part)
    seconds = time.monotonic() - started
    for kind in arguments.kind:
        print(f"{kind:<7} {tally.read[kind]:>7,} read  {tally.refused[kind]:>7,} refused")
    total = sum(tally.read.values()) + sum(tally.refused.values())
    slowest = f"slowest {tally.slowest_in_seconds:.2f} s of computing"
    print(f"{total:,} inputs, {total / seconds:,.0f} a second, {slowest}, {len(tally.findings)} findings")
    if tally.findings:
        print(f"kept in {arguments.keep}")
    return 1 if tally.findings else 0


if __name__ == "__main__":
    sys.exit(main())
