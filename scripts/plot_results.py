"""Plot a metric of several sweeps (results.csv of eval.py) against a column, such as nfe (function evaluations).

    python scripts/plot_results.py uniform/results.csv annealed/results.csv --x nfe --output nfe.png
"""
import csv
from pathlib import Path

from matplotlib.figure import Figure

from util.cluster import run_main
from util.command_line import Parser, as_type, path


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("tables", nargs="+", type=as_type(path), help="results.csv files; lines are named by folder and --by")
    add("--x", default="nfe", help="column of the horizontal axis")
    add("--y", help="column of the vertical axis; default: the first distance")
    add("--by", default="solver", help="column with one line per value")
    add("--log", action="store_true", help="logarithmic horizontal axis")
    add("--output", type=as_type(path), required=True, help="picture to write")
    return parser.parse_args()


def main():
    args = parse_args()
    figure = Figure(figsize=(7, 4.5), dpi=100)
    axis = figure.subplots()
    for table, style in zip(args.tables, ("o-", "s--", "^:", "d-.") * len(args.tables)):
        with open(table, newline="") as file:
            rows = list(csv.DictReader(file))
        y = args.y or next(name for name in rows[0] if name == "fid" or "distance" in name)
        lines = {}
        for row in rows:
            if ":" not in row[args.x]:  # a list, one number for each scale, has no place on an axis
                lines.setdefault(row[args.by], []).append((float(row[args.x]), float(row[y])))
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points)), style, label=f"{name}, {Path(table).parent.name}")
    axis.set(xlabel=args.x, ylabel=y, xscale="log" if args.log else "linear")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.tight_layout()
    figure.savefig(args.output)
    print(args.output)


if __name__ == "__main__":
    run_main(main)
