"""Plot a metric of several sweeps (results.csv of eval.py) against a column, such as the number of function evaluations.

    python scripts/plot_results.py uniform/results.csv annealed/results.csv --x nfe --output nfe.png
"""
import argparse
import csv
from pathlib import Path

import project_root  # noqa: F401

import matplotlib.pyplot as plt

from models import FlowARError
from models.errors import name_some, reading
from util.cluster import run_main
from util.files import check_output
from util.options import some_path


plt.switch_backend("Agg")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("tables", nargs="+", help="results.csv files; a line is named by its folder and --by")
    parser.add_argument("--x", default="nfe", help="column of the horizontal axis")
    parser.add_argument("--y", help="column of the vertical axis; default: the first")
    parser.add_argument("--by", default="solver", help="column that separates lines")
    parser.add_argument("--log", action="store_true", help="logarithmic horizontal axis")
    parser.add_argument("--output", type=some_path, required=True, help="PNG to write")
    return parser.parse_args()


def read_table(path):
    with reading(path), open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise FlowARError(f"{path}: no rows in this table")
    return rows


def lines_of(path, x, y, by):
    """{name: [(x, y), ...]} of one table."""
    rows = read_table(path)
    lists = [row for row in rows if ":" in str(row.get(x))]  # one number for each scale: no place on an axis
    if lists and len(lists) == len(rows):
        raise FlowARError(f"{path}: every {x} is a list, such as {lists[0][x]}, one number for each scale: give another --x, such as nfe")
    if lists:
        print(f"{path}: left out are {len(lists)} rows whose {x} is a list, such as {lists[0][x]}")
        rows = [row for row in rows if row not in lists]
    y = y or next((str(key) for key in rows[0] if "distance" in str(key) or key == "fid"), "fid")
    lines = {}
    for row in rows:
        try:
            name = f"{row[by]}, {Path(path).parent.name}".replace("$", r"\$")  # no formulas
            lines.setdefault(name, []).append((float(row[x]), float(row[y])))
        except KeyError as error:
            raise FlowARError(f"{path}: no column {error}; it has {name_some(map(str, row), 12)}") from error
        except (TypeError, ValueError) as error:
            raise FlowARError(f"{path}: {x} {row.get(x)!r} and {y} {row.get(y)!r} are not numbers") from error
    return y, lines


def main():
    args = parse_args()
    check_output(args.output)
    figure, axis = plt.subplots(figsize=(7, 4.5), dpi=100)
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for number, (path, style) in enumerate(zip(args.tables, ("o-", "s--", "^:", "d-.") * len(args.tables))):
        y, lines = lines_of(path, args.x, args.y, args.by)
        first = number % len(colors) if len(lines) == 1 else 0  # a line alone has a colour of its own
        for (name, points), color in zip(lines.items(), colors[first:]):
            axis.plot(*zip(*sorted(points)), style, color=color, label=name)
    axis.set(xlabel=args.x, ylabel=y, xscale="log" if args.log else "linear")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.tight_layout()
    try:
        figure.savefig(args.output)
    except (OSError, ValueError) as error:
        raise FlowARError(f"{args.output}: cannot be written ({error})") from error
    print(args.output)


if __name__ == "__main__":
    run_main(main)
