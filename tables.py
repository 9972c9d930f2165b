"""
What laws.py, plan.py and runs.py share: numbers as people write them, tables as files and on the screen, the commands.
"""

import argparse
import csv
import difflib
import itertools
import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

# what a damaged file can raise on its way through json, csv and arithmetic
DAMAGE = ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, argparse.ArgumentTypeError


def number(text, least=1e-60):
    """A float that people may write as 1e9 or 2_000_000, and a computer can multiply: from `least` to 1e60."""
    if not least <= float(text) <= 1e60:
        raise argparse.ArgumentTypeError(f"{text} (must be a finite number above 0)")
    return float(text)


def whole(text):
    if number(text) != int(number(text)) or number(text) > 1e9:
        raise argparse.ArgumentTypeError(f"{text} (must be a whole number, 1 to 1e9)")
    return int(number(text))


def read_csv(path):
    """The rows of a CSV file as dicts of text. ValueError if it is none, or rows do not match the header."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file (give a run table, e.g. from `runs.py table`)")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            header, *rows = [r for r in csv.reader(file) if r] or [[]]
        except csv.Error as wrong:
            raise ValueError(f"{path} is not CSV: {wrong}") from None
    if "\0" in "".join(header):
        raise ValueError(f"{path} is UTF-16 (save it as CSV in UTF-8)")
    mark = re.search("[;\t|]", header[0]) if len(header) == 1 else None
    for i, r in enumerate(rows, 1):
        if len(r) > len({*header}) and not mark:  # then column() says what it is
            raise ValueError(f"{path}, row {i} has {len(r)} cells for the columns {', '.join(header)} (one each, and a "
                             "point for decimals)")
    return [dict(itertools.zip_longest(header, r[: len(header)], fillvalue="")) for r in rows]


def named(rows, i):
    """A row as an error calls it: its number and, in a table of runs.py, its run."""
    return f"row {i + 1}" + (f" ({rows[i]['run']})" if rows[i].get("run") else "")


def column(path, rows, name, least=1e-60):
    """One column's numbers, or its text if `least` is None. ValueError names what is wrong with the column or row."""
    header = list(rows[0]) if rows else []
    if name not in header:
        near = ", ".join(difflib.get_close_matches(name.lower(), header, 3, 0))
        near = f"nearest: {near}" if rows else "it has no rows"
        if len(header) == 1 and (mark := re.search("[;\t|]", header[0])):
            near = f"its header {header[0]!r} is separated by {mark[0]!r}: use commas, and points for decimals"
        elif blank := [h for h in header if h.strip() == name]:
            near = f"its header has {blank[0]!r}: take the blanks out"
        raise ValueError(f"{path} has no column {name} ({near})")
    values = [r[name].strip() for r in rows]
    for i, cell in enumerate(values if least is not None else []):
        try:
            values[i] = number(cell, least)
        except DAMAGE:
            remedy = "a finite number above 0" if cell else "unknown: leave the row out"
            if re.fullmatch(r"\d{1,3}(,\d{3})+", cell):
                remedy = "thousands: leave the commas out; a decimal comma: write a point"
            elif re.fullmatch(r"\d+,\d+(e\d+)?", cell):
                remedy = "a decimal comma: write a point"
            raise ValueError(f"{path}, {named(rows, i)}, column {name}: {cell!r} ({remedy})") from None
    return values


def chosen(path, rows, conditions):
    """The rows that meet all `conditions`, as "arm=upcycled". ValueError names what a column holds instead."""
    for condition in conditions:
        name, _, value = condition.partition("=")
        cells = column(path, rows, name, least=None)
        if value not in cells:
            held = ", ".join(map(repr, sorted({*cells})[:9]))
            raise ValueError(f"--where {condition} meets no row of {path} ({name} holds {held}; write COLUMN=VALUE)")
        rows = [r for r, cell in zip(rows, cells) if cell == value]
    return rows


def show(rows):
    """Rows of cells, the first the heading, in aligned columns; empty ones are left out. A pair is an interval."""

    def text(cell):
        if isinstance(cell, list):
            return "{:.4g} to {:.4g}".format(*cell)
        return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)

    shown = [c for c in zip(*[map(text, r) for r in rows]) if any(c[1:])]  # columns
    for cells in zip(*[[cell.ljust(max(map(len, column))) for cell in column] for column in shown]):
        print("  ".join(cells).rstrip())


def print_anything():
    """What the terminal's encoding cannot say is printed as "?", and to a closed output (`>&-`) nothing is: no work
    that is done ends in a traceback over it."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistyped flag with the nearest one that it knows."""

    def __init__(self, *args, **more):
        super().__init__(*args, allow_abbrev=False, **more)
        print_anything()

    def parse_known_args(self, args=None, namespace=None):
        """A shell leaves the ~ of --out=~/run as it is: it means the home directory here, too."""
        home = re.compile(r"^(--[\w-]+=)(~)(?=/|$)")
        words = map(str, sys.argv[1:] if args is None else args)
        words = [home.sub(lambda m: m[1] + os.path.expanduser(m[2]), word) for word in words]
        return super().parse_known_args(words, namespace)

    def known(self):
        return [*self._option_string_actions]

    def error(self, message):
        flags = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized arguments") else []
        near = [name for flag in flags for name in difflib.get_close_matches(flag, self.known(), 1)]
        super().error(message + f" (did you mean {', '.join(near)}?)" * bool(near))


class Commands(Parser):
    """A parser with subcommands. Its help opens with the lines of a file's docstring that begin with `python`."""

    def __init__(self, prog, usage, doc, epilog=None):
        lines = "\n".join(line.strip() for line in doc.splitlines() if line.startswith("    python"))
        super().__init__(prog, usage, lines, epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.places = self.add_subparsers(dest="command", required=True, metavar="command",
                                          parser_class=argparse.ArgumentParser)

    def known(self):
        return [name for sub in self.places.choices.values() for name in sub._option_string_actions]

    def command(self, run, usage, help, plot=None):
        """A subcommand for a function that begins with `run_`."""
        name = run.__name__.removeprefix("run_")
        sub = self.places.add_parser(name, prog=self.prog, usage=f"{self.prog} {name} {usage}", help=help,
                                     description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        add = sub.add_argument_group("output").add_argument
        add("--json", action="store_true", help="one JSON object, for programs (default: off)")
        if plot:
            add("--plot", metavar="FILE", help=f"draw {plot} to a .png, .pdf or .svg (default: no plot)")
        return sub

    def answer(self, argv):
        """Runs the command: it prints for people, or returns what --json prints. What is wrong leaves with status 2."""
        args = self.parse_args(argv)
        try:
            if getattr(args, "plot", None) is not None:
                where = Path(args.plot)
                if where.suffix not in (".png", ".pdf", ".svg") or where.is_dir() or not where.parent.is_dir():
                    raise ValueError(f"--plot {where} (give a .png, .pdf or .svg in a folder that exists)")
                if find_spec("matplotlib") is None:
                    raise ValueError(f"--plot {where} needs matplotlib (pip install matplotlib)")
            result = args.run(args)
            if getattr(args, "plot", None) is not None:
                print(f"written: {args.plot}", file=sys.stderr)
            if args.json:
                print(json.dumps(result, allow_nan=False))
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
            os._exit(0)
        except (ValueError, OSError) as wrong:
            self.error(" ".join(str(wrong)[:1000].split()))
