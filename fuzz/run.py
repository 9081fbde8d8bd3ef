"""Run one harness: `python fuzz/run.py NAME --minutes M --runs N`, or all names with `--list`.

A harness is `fuzz_NAME.py` with `fuzz_one(data)`, which returns for every input or fails an
assertion. It starts from the vectors of `protocols/` and from `corpus/NAME/`, and may say with
`MAX_INPUT` how long an input is worth being. What libFuzzer finds on the way goes to a temporary
folder that the run names, and so does an input that fails; `--replay FILE` gives it to the harness
again, and `--shrink FILE` looks for a shorter one that fails in the same place. Neither needs
atheris.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr
from pathlib import Path

HERE = Path(__file__).parent
INPUT_SECONDS = 5  # one input that takes longer is a finding
MEMORY_MIB = 1024  # and so is a process that grows beyond this

Harness = Callable[[bytes], None]


def names() -> list[str]:
    return sorted(path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.py"))


def load(name: str) -> Harness:
    fuzz_one: Harness = importlib.import_module(f"fuzz.fuzz_{name}").fuzz_one
    return fuzz_one


def fuzz(name: str, options: argparse.Namespace) -> None:
    """Hand over to libFuzzer, which ends the process."""
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: python -m pip install atheris (Linux, CPython)")
    with ExitStack() as importing:
        if options.quiet:
            importing.enter_context(redirect_stderr(io.StringIO()))
        importing.enter_context(atheris.instrument_imports(include=["p2pmoe"]))
        fuzz_one = load(name)
    from fuzz import dictionary, seeds  # after the harness: what they import is not watched

    work = options.work or Path(tempfile.mkdtemp(prefix=f"p2pmoe-fuzz-{name}-"))
    found, failing, words = work / "found", work / "failing", work / "words"
    found.mkdir(parents=True, exist_ok=True)
    failing.mkdir(exist_ok=True)
    words.write_text(dictionary.words())
    seeds.write(name, work / "seeds")
    print(f"{name}: new coverage goes to {found}, what fails to {failing}", flush=True)
    flags = {
        "max_len": seeds.longest(name),
        "artifact_prefix": f"{failing}/",
        "dict": words,
        "timeout": INPUT_SECONDS,
        "rss_limit_mb": MEMORY_MIB,
        "print_final_stats": 1,
        "verbosity": 0 if options.quiet else 1,
    }
    if options.runs:
        flags |= {"runs": options.runs}
    if options.minutes or not options.runs:
        flags |= {"max_total_time": max(1, round((options.minutes or 1) * 60))}
    command = [f"-{flag}={value}" for flag, value in flags.items()]
    atheris.Setup([sys.argv[0], *command, str(found), str(work / "seeds")], fuzz_one)
    atheris.Fuzz()


def failure(fuzz_one: Harness, data: bytes) -> tuple[str, str, int] | None:
    """What an input raises, and in which line; `None` if the harness takes it."""
    try:
        fuzz_one(data)
    except Exception as error:  # noqa: BLE001  whatever is raised is the finding
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        assert frame is not None
        return type(error).__name__, frame.tb_frame.f_code.co_filename, frame.tb_lineno
    return None


def shrink(fuzz_one: Harness, data: bytes) -> bytes:
    """A shorter input that fails in the same place: pieces left out, then bytes made 0."""
    wanted = failure(fuzz_one, data)
    if wanted is None:
        sys.exit("the harness takes this input: there is nothing to shrink")
    size = len(data)
    while size := size // 2:
        at = 0
        while at < len(data):
            shorter = data[:at] + data[at + size :]
            if failure(fuzz_one, shorter) == wanted:
                data = shorter
            else:
                at += size
    for at in range(len(data)):
        simpler = data[:at] + b"\0" + data[at + 1 :]
        data = simpler if failure(fuzz_one, simpler) == wanted else data
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz one part of p2pmoe.")
    parser.add_argument("name", nargs="?", choices=names())
    parser.add_argument("--minutes", type=float, help="how long (1, if --runs does not end it)")
    parser.add_argument("--runs", type=int, help="how many inputs at most")
    parser.add_argument("--work", type=Path, help="where to keep what is found")
    parser.add_argument("--quiet", action="store_true", help="say no more than what was found")
    parser.add_argument("--replay", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--shrink", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    if options.list:
        print("\n".join(names()))
    elif options.name is None:
        parser.error(f"NAME is one of {', '.join(names())}")
    elif options.shrink:
        short = shrink(load(options.name), options.shrink.read_bytes())
        smaller = options.shrink.with_suffix(".short")
        smaller.write_bytes(short)
        print(f"{smaller}: {len(short)} bytes: {short.hex()}")
    elif options.replay:
        for path in options.replay:
            load(options.name)(path.read_bytes())
    else:
        fuzz(options.name, options)


if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)  # the package beside these harnesses, not one that is installed
    main()
