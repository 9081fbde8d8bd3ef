"""Run one harness: `python fuzz/run.py NAME --minutes M`, or all names with `--list`.

A harness is `fuzz_NAME.py` with `fuzz_one(data)`, which returns for every input or fails an
assertion. It starts from the seeds in `corpus/NAME/`. What libFuzzer finds on the way goes to a
temporary folder that the run names, and so does an input that fails; `--replay FILE` gives it to
the harness again, without atheris. A finding becomes a vector in `protocols/`, or a seed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
MAX_INPUT = 4096  # bytes of one input; every bound of the wire but the longest can be met with it


def names() -> list[str]:
    return sorted(path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.py"))


def fuzz(name: str, minutes: float) -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: python -m pip install atheris (Linux, CPython)")
    with atheris.instrument_imports(include=["p2pmoe"]):
        harness = importlib.import_module(f"fuzz_{name}")
    work = Path(tempfile.mkdtemp(prefix=f"p2pmoe-fuzz-{name}-"))
    found, failing = work / "found", work / "failing"
    found.mkdir()
    failing.mkdir()
    print(f"inputs with new coverage: {found}\ninputs that fail: {failing}", flush=True)
    options = [f"-max_total_time={round(minutes * 60)}", f"-max_len={MAX_INPUT}"]
    options += [f"-artifact_prefix={failing}/", "-timeout=5"]
    atheris.Setup(
        [sys.argv[0], *options, str(found), str(HERE / "corpus" / name)], harness.fuzz_one
    )
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz one part of p2pmoe.")
    parser.add_argument("name", nargs="?", choices=names())
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--replay", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    if options.list:
        print("\n".join(names()))
    elif options.name is None:
        parser.error(f"NAME is one of {', '.join(names())}")
    elif options.replay:
        harness = importlib.import_module(f"fuzz_{options.name}")
        for path in options.replay:
            harness.fuzz_one(path.read_bytes())
    else:
        fuzz(options.name, options.minutes)


if __name__ == "__main__":
    main()
